//! Events that webhooks must still be told.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use super::rows::job;
use super::store::milliseconds;
use super::{Error, Event, Job, JobId, Store};

/// How long a delivery is left to whoever took it.
const DELIVERING: Duration = Duration::from_secs(60);

/// Lines that are logged within so long are told together.
pub(super) const TOGETHER: Duration = Duration::from_millis(500);

/// An event that a webhook must be told. Whoever has it has a minute to do so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    pub job: JobId,
    pub event: Event,
    /// Deliveries that failed so far.
    pub attempts: i64,
    /// Characters of the job's logs when the event was written. They only grow.
    pub logged: i64,
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

    /// Events to be told now, at most `limit`, with the jobs that they are of. Taken for a minute. No tenant has more than `most` at a
    /// time: `telling` says how many each has already. Whoever has fewest is first, so that nobody waits for another's receiver.
    pub async fn due(&self, limit: i64, most: i64, telling: &BTreeMap<String, i64>) -> Result<Vec<(Delivery, Job)>, Error> {
        let cases: String = telling.values().enumerate().map(|(i, n)| format!("WHEN ${} THEN {n} ", i + 3)).collect();
        let already = if cases.is_empty() { "0".into() } else { format!("CASE jobs.tenant {cases}ELSE 0 END") };
        let find = format!(
            "SELECT job, event FROM (
                 SELECT outbox.job AS job, outbox.event AS event, outbox.next_at AS next_at,
                     ROW_NUMBER() OVER (PARTITION BY jobs.tenant ORDER BY outbox.next_at, outbox.job) + {already} AS place
                 FROM outbox JOIN jobs ON jobs.id = outbox.job WHERE outbox.next_at <= {{now}}
             ) ready WHERE place <= $1 ORDER BY place, next_at LIMIT $2"
        );
        let mut find = self.query(&find).bind(most).bind(limit);
        for tenant in telling.keys() {
            find = find.bind(tenant);
        }
        // Looked for without the writer's lock: mostly there is nothing.
        let names = |row: &AnyRow| -> Result<(String, String), Error> { Ok((row.try_get("job")?, row.try_get("event")?)) };
        let mut found = find.fetch_all(self.pool()).await?.iter().map(names).collect::<Result<Vec<_>, _>>()?;
        if found.is_empty() {
            return Ok(Vec::new());
        }
        // In one order, so that two services do not wait for each other.
        found.sort();
        let mut transaction = self.begin().await?;
        let mut due = Vec::new();
        for (job_id, event) in &found {
            // Another service may have been faster.
            let take = "UPDATE outbox SET next_at = {now} + $1 WHERE job = $2 AND event = $3 AND next_at <= {now} \
                 RETURNING job, event, attempts, logged";
            let take = self.query(take).bind(milliseconds(DELIVERING)).bind(job_id).bind(event);
            let Some(row) = take.fetch_optional(&mut *transaction).await? else { continue };
            let delivery = delivery(&row)?;
            let find = self.query("SELECT {columns} FROM jobs WHERE id = $1").bind(delivery.job.as_str());
            if let Some(row) = find.fetch_optional(&mut *transaction).await? {
                due.push((delivery, job(&row)?));
            }
        }
        transaction.commit().await?;
        Ok(due)
    }

    /// The idempotency key that named this job, if it begins so and is remembered.
    pub async fn key_of(&self, job: &Job, begins: &str) -> Result<Option<String>, Error> {
        let find = self.query("SELECT key FROM idempotency WHERE tenant = $1 AND job = $2 AND key LIKE $3");
        let find = find.bind(&job.tenant).bind(job.id.as_str()).bind(format!("{begins}%"));
        Ok(find.fetch_optional(self.pool()).await?.map(|row| row.try_get("key")).transpose()?)
    }

    /// Told, or given up. Lines that were logged meanwhile are told next.
    pub async fn delivered(&self, delivery: &Delivery) -> Result<(), Error> {
        let done = self.query("DELETE FROM outbox WHERE job = $1 AND event = $2 AND logged = $3").bind(delivery.job.as_str());
        let done = done.bind(delivery.event.as_str()).bind(delivery.logged).execute(self.pool()).await?;
        if done.rows_affected() == 0 {
            self.put_off(delivery, TOGETHER).await?;
        }
        Ok(())
    }

    /// To be told after `pause`, as if nobody had taken it: nobody was asked to hear it.
    pub async fn put_off(&self, delivery: &Delivery, pause: Duration) -> Result<(), Error> {
        let later = self.query("UPDATE outbox SET next_at = {now} + $1 WHERE job = $2 AND event = $3");
        let later = later.bind(milliseconds(pause)).bind(delivery.job.as_str()).bind(delivery.event.as_str());
        later.execute(self.pool()).await?;
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
        logged: row.try_get("logged")?,
    })
}
