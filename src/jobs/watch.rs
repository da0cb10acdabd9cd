//! What the service asks the queue as a whole: what ended lately, what waits, what is next, what grew old.

use std::time::Duration;

use serde_json::{Map, Value};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::rows::job;
use super::store::milliseconds;
use super::{Error, Job, JobId, Store};

/// What `data_removed` is: nothing is left, or only the files in storage.
const REMOVED: i64 = 1;
const FILES_LEFT: i64 = 2;

/// Jobs that ended, and the database's time, from which the next question goes on.
#[derive(Debug, Clone)]
pub struct Ended {
    pub jobs: Vec<JobId>,
    pub now: i64,
}

/// How long the queue is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    pub queued: i64,
    pub running: i64,
    /// Milliseconds that the longest waiting job has waited.
    pub longest: i64,
    /// Events that webhooks were not told yet.
    pub untold: i64,
}

impl Store {
    /// Jobs that ended at `since` or later, in milliseconds since 1970 by the database's clock.
    pub async fn ended(&self, since: i64) -> Result<Ended, Error> {
        let ended = self.query("SELECT id FROM jobs WHERE completed_at >= $1").bind(since).fetch_all(self.pool()).await?;
        let jobs = ended.iter().map(id).collect::<Result<_, Error>>()?;
        Ok(Ended { jobs, now: self.now().await? })
    }

    /// The database's time in milliseconds since 1970.
    pub async fn now(&self) -> Result<i64, Error> {
        Ok(self.query("SELECT {now}").fetch_one(self.pool()).await?.try_get(0)?)
    }

    /// How many jobs wait for each model.
    pub async fn waiting_by_base(&self) -> Result<Vec<(String, i64)>, Error> {
        let count = self.query("SELECT base, COUNT(*) FROM jobs WHERE status = 'queued' GROUP BY base ORDER BY base");
        count.fetch_all(self.pool()).await?.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }

    pub async fn waiting(&self) -> Result<Waiting, Error> {
        let count = "SELECT COALESCE(SUM(CASE WHEN status = 'queued' THEN 1 ELSE 0 END), 0), \
             COALESCE(SUM(CASE WHEN status = 'running' THEN 1 ELSE 0 END), 0), \
             COALESCE({now} - MIN(CASE WHEN status = 'queued' THEN created_at END), 0), \
             (SELECT COUNT(*) FROM outbox) FROM jobs WHERE status IN ('queued', 'running')";
        let row = self.query(count).fetch_one(self.pool()).await?;
        Ok(Waiting { queued: row.try_get(0)?, running: row.try_get(1)?, longest: row.try_get(2)?, untold: row.try_get(3)? })
    }

    /// The names of the first `limit` jobs that wait for the model `base`, of all tenants: what a worker may soon need. It asks all the
    /// time, so no more of them is read.
    pub async fn upcoming(&self, base: &str, limit: i64) -> Result<Vec<JobId>, Error> {
        let next = self.query("SELECT id FROM jobs WHERE status = 'queued' AND base = $1 ORDER BY id LIMIT $2");
        next.bind(base).bind(limit).fetch_all(self.pool()).await?.iter().map(id).collect()
    }

    /// Those of `jobs` that are not over.
    pub async fn open_of(&self, jobs: &[JobId]) -> Result<Vec<JobId>, Error> {
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let places = (1..=jobs.len()).map(|i| format!("${i}")).collect::<Vec<_>>().join(", ");
        let text = format!("SELECT id FROM jobs WHERE completed_at IS NULL AND id IN ({places})");
        let open = jobs.iter().fold(self.query(&text), |query, job| query.bind(job.as_str()));
        open.fetch_all(self.pool()).await?.iter().map(id).collect()
    }

    /// Jobs that ended longer ago than `age` and of which something is left: at most 100. Those of which only files are left come last and
    /// are drawn by lot, so that what cannot be removed does not keep back the others.
    pub async fn old(&self, age: Duration) -> Result<Vec<Job>, Error> {
        let old = "SELECT {columns} FROM jobs WHERE data_removed <> $1 AND completed_at < {now} - $2 \
             AND id NOT IN (SELECT job FROM outbox) ORDER BY data_removed, RANDOM() LIMIT 100";
        self.query(old).bind(REMOVED).bind(milliseconds(age)).fetch_all(self.pool()).await?.iter().map(job).collect()
    }

    /// Removes input, logs and result of a job. Of the request the members `kept` stay. While files are left it is one of [`Self::old`].
    pub async fn strip(&self, Job { id, request, .. }: &Job, kept: &[&str], files_gone: bool) -> Result<(), Error> {
        let rest: Map<String, Value> = kept.iter().map(|name| ((*name).into(), request[*name].clone())).collect();
        let strip = "UPDATE jobs SET data_removed = $1, logs = '', result = NULL, request = $2, progress = NULL, webhook = NULL \
             WHERE id = $3";
        let strip = self.query(strip).bind(if files_gone { REMOVED } else { FILES_LEFT });
        strip.bind(Value::Object(rest).to_string()).bind(id.as_str()).execute(self.pool()).await?;
        Ok(())
    }

    /// Forgets jobs that ended longer ago than `age` and of which nothing is left, in storage either: what is not named is never removed.
    pub async fn forget(&self, age: Duration) -> Result<u64, Error> {
        let forget = self.query("DELETE FROM jobs WHERE data_removed = $1 AND completed_at < {now} - $2");
        let forget = forget.bind(REMOVED).bind(milliseconds(age));
        let forgotten = forget.execute(self.pool()).await?.rows_affected();
        if forgotten > 0 {
            let keys = self.query("DELETE FROM idempotency WHERE job NOT IN (SELECT id FROM jobs)");
            keys.execute(self.pool()).await?;
        }
        Ok(forgotten)
    }
}

fn id(row: &AnyRow) -> Result<JobId, Error> {
    row.try_get::<String, _>(0)?.parse().map_err(|()| Error::Damaged("id"))
}
