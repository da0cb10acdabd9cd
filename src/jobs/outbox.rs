//! Events that webhooks must still be told.

use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use super::rows::job;
use super::store::milliseconds;
use super::{Error, Event, Job, JobId, Store};

/// How long a delivery is left to whoever took it.
const DELIVERING: Duration = Duration::from_secs(60);

/// An event that a webhook must be told. Whoever has it has a minute to do so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    pub job: JobId,
    pub event: Event,
    /// Deliveries that failed so far.
    pub attempts: i64,
}

impl Store {
    /// Whoever used this database before is gone: what they held is free at once. Only a file that its caller has locked is known to be
    /// nobody else's; with PostgreSQL leases end in their time.
    pub async fn take_over(&self) -> Result<(), Error> {
        if !self.is_file() {
            return Ok(());
        }
        self.query("UPDATE jobs SET lease_until = 0 WHERE status = 'running'").execute(self.pool()).await?;
        let free = "UPDATE outbox SET next_at = {now} WHERE next_at > {now} AND next_at <= {now} + $1";
        self.query(free).bind(milliseconds(DELIVERING)).execute(self.pool()).await?;
        Ok(())
    }

    /// Events to be told now, at most `limit`, with the jobs that they are of. Taken for a minute.
    pub async fn due(&self, limit: i64) -> Result<Vec<(Delivery, Job)>, Error> {
        let mut transaction = self.begin().await?;
        let take = "UPDATE outbox SET next_at = {now} + $1 WHERE (job, event) IN \
             (SELECT job, event FROM outbox WHERE next_at <= {now} ORDER BY next_at LIMIT $2 {skip}) RETURNING job, event, attempts";
        let rows = self.query(take).bind(milliseconds(DELIVERING)).bind(limit).fetch_all(&mut *transaction).await?;
        let mut due = Vec::new();
        for row in &rows {
            let delivery = delivery(row)?;
            let find = self.query("SELECT {columns} FROM jobs WHERE id = $1").bind(delivery.job.as_str());
            if let Some(row) = find.fetch_optional(&mut *transaction).await? {
                due.push((delivery, job(&row)?));
            }
        }
        transaction.commit().await?;
        Ok(due)
    }

    /// Told, or given up.
    pub async fn delivered(&self, delivery: &Delivery) -> Result<(), Error> {
        let done = self.query("DELETE FROM outbox WHERE job = $1 AND event = $2").bind(delivery.job.as_str());
        done.bind(delivery.event.as_str()).execute(self.pool()).await?;
        Ok(())
    }

    /// To be told again after `pause`.
    pub async fn undelivered(&self, delivery: &Delivery, pause: Duration) -> Result<(), Error> {
        let again = "UPDATE outbox SET attempts = attempts + 1, next_at = {now} + $1 WHERE job = $2 AND event = $3";
        let again = self.query(again).bind(milliseconds(pause)).bind(delivery.job.as_str()).bind(delivery.event.as_str());
        again.execute(self.pool()).await?;
        Ok(())
    }
}

fn delivery(row: &AnyRow) -> Result<Delivery, Error> {
    Ok(Delivery {
        job: row.try_get::<String, _>("job")?.parse().map_err(|()| Error::Damaged("outbox"))?,
        event: row.try_get::<String, _>("event")?.parse().map_err(|()| Error::Damaged("outbox"))?,
        attempts: row.try_get("attempts")?,
    })
}
