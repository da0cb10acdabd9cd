//! Accepting jobs. Those who come at the same time share one commit, which is one wait for the disk.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::{AnyConnection, Row};
use tokio::sync::oneshot;

use super::rows::job;
use super::{Error, Job, JobId, NewJob, Store};

type Accepted = Result<(Job, bool), Error>;
type Place = (NewJob, oneshot::Sender<Accepted>);

/// Where new jobs queue up to be written.
#[derive(Debug, Default)]
pub(super) struct Counter {
    waiting: Mutex<Vec<Place>>,
    writer: tokio::sync::Mutex<()>,
}

impl Counter {
    fn waiting(&self) -> MutexGuard<'_, Vec<Place>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many jobs wait, in all and of each tenant, while a batch is written.
#[derive(Debug, Default)]
struct Lengths {
    all: Option<i64>,
    own: HashMap<String, i64>,
}

impl Store {
    /// Accepts a job: when this returns it is committed. `false` if an idempotency key named an earlier one, which is returned.
    pub async fn submit(&self, new: &NewJob) -> Accepted {
        let (place, answer) = oneshot::channel();
        self.counter.waiting().push((new.clone(), place));
        // In a task of its own: a client that leaves must not undo what others were told.
        tokio::spawn(self.clone().write_waiting());
        answer.await.unwrap_or(Err(Error::Failed("the writer ended".into())))
    }

    /// Whoever gets the pen writes for all who wait.
    async fn write_waiting(self) {
        let _pen = self.counter.writer.lock().await;
        let batch = std::mem::take(&mut *self.counter.waiting());
        if batch.is_empty() {
            return;
        }
        let (jobs, places): (Vec<NewJob>, Vec<_>) = batch.into_iter().unzip();
        let answers = match self.write(&jobs).await {
            Ok(answers) => answers,
            Err(error) if error.is_outage() => {
                let text: Arc<str> = error.to_string().into();
                jobs.iter().map(|_| Err(Error::Failed(text.clone()))).collect()
            }
            // One of them cannot be stored. Each by itself: the others can.
            Err(_) => {
                let mut answers = Vec::new();
                for new in &jobs {
                    answers.extend(self.write(std::slice::from_ref(new)).await.unwrap_or_else(|error| vec![Err(error)]));
                }
                answers
            }
        };
        places.into_iter().zip(answers).for_each(|(place, answer)| drop(place.send(answer)));
    }

    /// One answer for each, or an error and no change for all.
    async fn write(&self, jobs: &[NewJob]) -> Result<Vec<Accepted>, Error> {
        let mut transaction = self.begin().await?;
        let mut lengths = Lengths::default();
        let mut answers = Vec::new();
        for new in jobs {
            match self.accept(&mut transaction, &mut lengths, new).await {
                // Refused before anything was written.
                answer @ (Ok(_) | Err(Error::TenantFull(_) | Error::Full(_) | Error::Conflict)) => answers.push(answer),
                Err(error) => return Err(error),
            }
        }
        transaction.commit().await?;
        Ok(answers)
    }

    async fn accept(&self, connection: &mut AnyConnection, lengths: &mut Lengths, new: &NewJob) -> Accepted {
        let id = JobId::new();
        if let Some((key, body)) = &new.idempotency
            && let Some(earlier) = self.earlier(connection, &new.tenant, key, body).await?
        {
            return Ok((earlier, false));
        }
        let (all, own) = self.lengths(connection, lengths, &new.tenant).await?;
        if own >= self.limits.waiting_of_tenant {
            return Err(Error::TenantFull(own));
        }
        if all >= self.limits.waiting {
            return Err(Error::Full(all));
        }
        if let Some((key, body)) = &new.idempotency {
            let remember = "INSERT INTO idempotency (tenant, key, body, job, created_at) VALUES ($1, $2, $3, $4, {now}) \
                 ON CONFLICT (tenant, key) DO NOTHING";
            let remember = self.query(remember).bind(&new.tenant).bind(key).bind(body).bind(id.as_str());
            if remember.execute(&mut *connection).await?.rows_affected() == 0 {
                // Another service was faster by a moment.
                let earlier = self.earlier(connection, &new.tenant, key, body).await?;
                return earlier.map(|earlier| (earlier, false)).ok_or(Error::Conflict);
            }
        }
        let events = new.webhook.iter().flat_map(|webhook| &webhook.events).map(|event| event.as_str());
        let insert = "INSERT INTO jobs (id, tenant, status, request, affinity, created_at, deadline, webhook, webhook_events, base) \
             VALUES ($1, $2, 'queued', $3, $4, {now}, {now} + CAST($5 AS BIGINT), $6, $7, $8) RETURNING {columns}";
        let insert = self
            .query(insert)
            .bind(id.as_str())
            .bind(&new.tenant)
            .bind(new.request.to_string())
            .bind(&new.affinity)
            .bind(new.within)
            .bind(new.webhook.as_ref().map(|webhook| webhook.url.clone()))
            .bind(events.collect::<Vec<_>>().join(" "))
            .bind(&new.base);
        let accepted = job(&insert.fetch_one(&mut *connection).await?)?;
        if accepted.request.is_null() {
            // Nobody could ever read it.
            return Err(Error::Damaged("request"));
        }
        lengths.all = Some(all + 1);
        lengths.own.insert(new.tenant.clone(), own + 1);
        Ok((accepted, true))
    }

    /// The job that a tenant's idempotency key named before, if what it was sent with is the same.
    pub async fn repeated(&self, tenant: &str, key: &str, body: &str) -> Result<Option<Job>, Error> {
        let mut connection = self.pool().acquire().await?;
        self.earlier(&mut connection, tenant, key, body).await
    }

    async fn earlier(&self, connection: &mut AnyConnection, tenant: &str, key: &str, body: &str) -> Result<Option<Job>, Error> {
        let earlier = self.query("SELECT body, job FROM idempotency WHERE tenant = $1 AND key = $2").bind(tenant).bind(key);
        let Some(row) = earlier.fetch_optional(&mut *connection).await? else { return Ok(None) };
        if row.try_get::<String, _>("body")? != body {
            return Err(Error::Conflict);
        }
        let find = self.query("SELECT {columns} FROM jobs WHERE id = $1").bind(row.try_get::<String, _>("job")?);
        find.fetch_optional(&mut *connection).await?.as_ref().map(job).transpose()
    }

    async fn lengths(&self, connection: &mut AnyConnection, known: &mut Lengths, tenant: &str) -> Result<(i64, i64), Error> {
        if let (Some(all), Some(own)) = (known.all, known.own.get(tenant)) {
            return Ok((all, *own));
        }
        let count =
            "SELECT COUNT(*), COALESCE(SUM(CASE WHEN tenant = $1 THEN 1 ELSE 0 END), 0) FROM jobs WHERE status = 'queued'";
        let row = self.query(count).bind(tenant).fetch_one(&mut *connection).await?;
        let (all, own) = (row.try_get(0)?, row.try_get(1)?);
        known.all = Some(all);
        known.own.insert(tenant.to_owned(), own);
        Ok((all, own))
    }
}
