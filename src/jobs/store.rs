//! The statements. Every change of state is one transaction, fenced by the claim's epoch.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sqlx::any::AnyPoolOptions;
use sqlx::{Any, AnyConnection, AnyPool, AssertSqlSafe, Executor, Row, Transaction};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::outbox::TOGETHER;
use super::rows::{COLUMNS, job};
use super::submit::Counter;
use super::{Claim, Error, Event, Job, JobId, Outcome, Status, Stop, schema};

/// How long an idempotency key is remembered.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

/// A job that took so many workers with it runs only when no other waits.
const QUARANTINE: i64 = 2;

#[derive(Debug, Clone)]
pub struct Limits {
    /// Jobs that may wait, in all and of one tenant.
    pub waiting: i64,
    pub waiting_of_tenant: i64,
    /// Bytes that the uploads of one tenant may take.
    pub files_of_tenant: i64,
    /// Among so many first jobs of a tenant, one whose adapters are warm may go first,
    pub window: i64,
    /// unless the first has waited this long.
    pub patience: Duration,
    /// How often a job may take its worker with it before it is given up.
    pub crashes: i64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            waiting: 1000,
            waiting_of_tenant: 100,
            files_of_tenant: 50 << 30,
            window: 32,
            patience: Duration::from_secs(30),
            crashes: 3,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// SQLite asks for the lock at once, rather than failing when a reader becomes a writer.
    pub(super) fn begin(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN IMMEDIATE",
            Self::Postgres => "BEGIN",
        }
    }

    /// The database's own clock, in milliseconds: the hosts' may differ.
    fn now(self) -> &'static str {
        match self {
            Self::Sqlite => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
            Self::Postgres => "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)",
        }
    }

    /// Several workers ask at the same time: each passes over what another one is taking.
    fn skip(self) -> &'static str {
        match self {
            Self::Sqlite => "",
            Self::Postgres => "FOR UPDATE SKIP LOCKED",
        }
    }
}

/// The queue and its history. Clones share the connections.
#[derive(Debug, Clone)]
pub struct Store {
    pool: AnyPool,
    dialect: Dialect,
    pub(super) limits: Limits,
    pub(super) counter: Arc<Counter>,
    turn: Arc<Semaphore>,
}

/// A transaction that writes. A file has one writer at a time: whoever waits does so before asking for a connection, and in turn. SQLite's own
/// waiting is not fair, and would hold one.
pub(super) struct Writing {
    transaction: Transaction<'static, Any>,
    _turn: Option<OwnedSemaphorePermit>,
}

impl Writing {
    pub(super) async fn commit(self) -> Result<(), Error> {
        Ok(self.transaction.commit().await?)
    }

    async fn rollback(self) -> Result<(), Error> {
        Ok(self.transaction.rollback().await?)
    }
}

impl Deref for Writing {
    type Target = AnyConnection;

    fn deref(&self) -> &AnyConnection {
        &self.transaction
    }
}

impl DerefMut for Writing {
    fn deref_mut(&mut self) -> &mut AnyConnection {
        &mut self.transaction
    }
}

pub(super) type Query<'q> = sqlx::query::Query<'q, Any, sqlx::any::AnyArguments>;

impl Store {
    /// `sqlite:PATH` (made if it is not there) or `postgres://...`, brought to this version's schema.
    pub async fn open(address: &str, limits: Limits) -> Result<Self, Error> {
        sqlx::any::install_default_drivers();
        let (dialect, file) = match address.split_once(':') {
            Some(("sqlite", path)) => (Dialect::Sqlite, Some(PathBuf::from(path))),
            Some(("postgres" | "postgresql", _)) => (Dialect::Postgres, None),
            _ => return Err(Error::Address(address.split_once('@').map_or(address, |(_, host)| host).into())),
        };
        let url = if dialect == Dialect::Sqlite { format!("{address}?mode=rwc") } else { address.to_owned() };
        let pool = AnyPoolOptions::new()
            .max_connections(8)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    if dialect == Dialect::Sqlite {
                        // Committed is on the disk, and readers do not wait for the writer.
                        for pragma in ["journal_mode = WAL", "synchronous = FULL", "busy_timeout = 10000"] {
                            connection.execute(AssertSqlSafe(format!("PRAGMA {pragma}"))).await?;
                        }
                    }
                    Ok(())
                })
            })
            .connect(&url)
            .await?;
        schema::migrate(&pool, dialect, file.as_deref()).await?;
        Ok(Self { pool, dialect, limits, counter: Arc::default(), turn: Arc::new(Semaphore::new(1)) })
    }

    fn sql(&self, text: &str) -> AssertSqlSafe<String> {
        let text = text.replace("{now}", self.dialect.now()).replace("{skip}", self.dialect.skip());
        AssertSqlSafe(text.replace("{columns}", COLUMNS))
    }

    pub(super) fn is_file(&self) -> bool {
        self.dialect == Dialect::Sqlite
    }

    pub(super) fn pool(&self) -> &AnyPool {
        &self.pool
    }

    pub(super) fn query<'q>(&self, text: &str) -> Query<'q> {
        sqlx::query(self.sql(text))
    }

    pub(super) async fn begin(&self) -> Result<Writing, Error> {
        // A semaphore that is never closed.
        let turn = if self.is_file() { self.turn.clone().acquire_owned().await.ok() } else { None };
        Ok(Writing { transaction: self.pool.begin_with(self.dialect.begin()).await?, _turn: turn })
    }

    /// A tenant's job. What belongs to another is not there.
    pub async fn get(&self, tenant: &str, id: &JobId) -> Result<Option<Job>, Error> {
        let find = self.query("SELECT {columns} FROM jobs WHERE id = $1 AND tenant = $2").bind(id.as_str()).bind(tenant);
        find.fetch_optional(&self.pool).await?.as_ref().map(job).transpose()
    }

    /// A tenant's jobs that were made in that time, in milliseconds since 1970 by the database's clock: newest first, from below `before`.
    pub async fn list(
        &self,
        tenant: &str,
        made: std::ops::Range<i64>,
        before: Option<&JobId>,
        limit: i64,
    ) -> Result<Vec<Job>, Error> {
        let list = "SELECT {columns} FROM jobs WHERE tenant = $1 AND id < $2 AND created_at >= $3 AND created_at < $4 \
                    ORDER BY id DESC LIMIT $5";
        // Behind every id.
        let before = before.map_or("~", JobId::as_str);
        let list = self.query(list).bind(tenant).bind(before).bind(made.start).bind(made.end).bind(limit);
        list.fetch_all(&self.pool).await?.iter().map(job).collect()
    }

    /// A job, whosever it is: for the service itself.
    pub async fn find(&self, id: &JobId) -> Result<Option<Job>, Error> {
        let find = self.query("SELECT {columns} FROM jobs WHERE id = $1").bind(id.as_str());
        find.fetch_optional(&self.pool).await?.as_ref().map(job).transpose()
    }

    /// The job that a tenant's idempotency key named.
    pub async fn keyed(&self, tenant: &str, key: &str) -> Result<Option<Job>, Error> {
        let find = "SELECT {columns} FROM jobs WHERE id = (SELECT job FROM idempotency WHERE tenant = $1 AND key = $2)";
        let find = self.query(find).bind(tenant).bind(key);
        find.fetch_optional(&self.pool).await?.as_ref().map(job).transpose()
    }

    /// How many jobs wait before this one, of all tenants.
    pub async fn ahead(&self, id: &JobId) -> Result<i64, Error> {
        let count = self.query("SELECT COUNT(*) FROM jobs WHERE status = 'queued' AND id < $1").bind(id.as_str());
        Ok(count.fetch_one(&self.pool).await?.try_get(0)?)
    }

    /// Stops a tenant's job: at once if it waits, within a step if it runs, not at all if it has ended.
    pub async fn cancel(&self, tenant: &str, id: &JobId) -> Result<Option<Job>, Error> {
        let mut transaction = self.begin().await?;
        // In one, as a job may be given back to the queue between two.
        let cancel = "UPDATE jobs SET stop_asked = COALESCE(stop_asked, 'canceled'), \
             completed_at = CASE WHEN status = 'queued' THEN {now} ELSE completed_at END, \
             status = CASE WHEN status = 'queued' THEN 'canceled' ELSE status END \
             WHERE id = $1 AND tenant = $2 AND status IN ('queued', 'running') RETURNING {columns}";
        let asked = self.query(cancel).bind(id.as_str()).bind(tenant).fetch_optional(&mut *transaction).await?;
        let Some(row) = asked else {
            // Before another connection is asked for: as many at once as there are connections would wait for each other.
            transaction.rollback().await?;
            return self.get(tenant, id).await;
        };
        let asked = job(&row)?;
        if asked.status.is_final() {
            self.tell(&mut transaction, &asked, Event::Completed).await?;
        }
        transaction.commit().await?;
        Ok(Some(asked))
    }

    /// The next job for a worker that has the model `base` and the adapter sets `warm`, for as long as `lease`; none of `except`. One that
    /// cannot be read fails, and the one after it is next.
    pub async fn claim(
        &self,
        worker: &str,
        base: &str,
        warm: &[String],
        except: &[JobId],
        lease: Duration,
    ) -> Result<Option<Claim>, Error> {
        let mut transaction = self.begin().await?;
        let one_of = |column: &str, first: usize, n: usize| match n {
            0 => "1 = 0".into(),
            n => format!("{column} IN ({})", (first..first + n).map(|i| format!("${i}")).collect::<Vec<_>>().join(", ")),
        };
        let warm_there = one_of("affinity", 4, warm.len());
        let waits = format!("status = 'queued' AND base = $3 AND NOT ({})", one_of("id", 4 + warm.len(), except.len()));
        let next = format!(
            "SELECT id FROM (
                 SELECT id, affinity, created_at, crashes FROM jobs WHERE {waits} AND tenant = (
                     SELECT waiting.tenant FROM (
                         SELECT tenant, MIN(id) AS first, MIN(crashes) AS crashes FROM jobs WHERE {waits} GROUP BY tenant
                     ) waiting LEFT JOIN tenants ON tenants.tenant = waiting.tenant
                     ORDER BY CASE WHEN waiting.crashes < {QUARANTINE} THEN 0 ELSE 1 END, COALESCE(tenants.last_start, 0), waiting.first
                     LIMIT 1
                 ) ORDER BY CASE WHEN crashes < {QUARANTINE} THEN 0 ELSE 1 END, id LIMIT $1 {{skip}}
             ) first_ones
             ORDER BY CASE WHEN crashes >= {QUARANTINE} THEN 3 WHEN created_at < {{now}} - $2 THEN 0 WHEN {warm_there} THEN 1 ELSE 2 END,
             id LIMIT 1"
        );
        let taken = loop {
            let mut first = self.query(&next).bind(self.limits.window).bind(milliseconds(self.limits.patience)).bind(base);
            for value in warm.iter().map(String::as_str).chain(except.iter().map(JobId::as_str)) {
                first = first.bind(value);
            }
            let Some(row) = first.fetch_optional(&mut *transaction).await? else {
                // Those that cannot be read have failed.
                transaction.commit().await?;
                return Ok(None);
            };
            let id: String = row.try_get(0)?;
            let take = "UPDATE jobs SET status = 'running', epoch = epoch + 1, worker = $1, lease_until = {now} + $2, \
                 started_at = COALESCE(started_at, {now}), progress = NULL WHERE id = $3 RETURNING {columns}";
            let take = self.query(take).bind(worker).bind(milliseconds(lease)).bind(&id);
            let row = take.fetch_one(&mut *transaction).await?;
            match job(&row) {
                Ok(taken) if !taken.request.is_null() => break taken,
                Ok(_) | Err(Error::Damaged(_)) => self.give_up(&mut transaction, &id).await?,
                Err(error) => return Err(error),
            }
        };
        let turn = "INSERT INTO tenants (tenant, last_start) VALUES ($1, {now}) \
             ON CONFLICT (tenant) DO UPDATE SET last_start = excluded.last_start";
        self.query(turn).bind(&taken.tenant).execute(&mut *transaction).await?;
        if taken.epoch == 1 {
            self.tell(&mut transaction, &taken, Event::Start).await?;
        }
        transaction.commit().await?;
        Ok(Some(Claim { job: taken, worker: worker.into() }))
    }

    /// Keeps a claim for another `lease` and says how far the job is. Answers whether it should stop; an error if the claim is lost.
    pub async fn heartbeat(
        &self,
        claim: &Claim,
        lease: Duration,
        progress: Option<&serde_json::Value>,
    ) -> Result<Option<Stop>, Error> {
        let beat = "UPDATE jobs SET lease_until = {now} + $1, progress = COALESCE($2, progress) \
             WHERE id = $3 AND epoch = $4 AND status = 'running' RETURNING stop_asked, CASE WHEN deadline < {now} THEN 1 ELSE 0 END";
        let beat = self.query(beat).bind(milliseconds(lease)).bind(progress.map(ToString::to_string));
        let beat = beat.bind(claim.job.id.as_str()).bind(claim.job.epoch);
        let row = beat.fetch_optional(&self.pool).await?.ok_or(Error::Lost)?;
        Ok(match (row.try_get::<Option<String>, _>(0)?.as_deref(), row.try_get::<i64, _>(1)?) {
            (Some("deadline"), _) | (None, 1) => Some(Stop::Deadline),
            (Some(_), _) => Some(Stop::Asked),
            (None, _) => None,
        })
    }

    /// Adds to the job's logs.
    pub async fn log(&self, claim: &Claim, text: &str) -> Result<(), Error> {
        let mut transaction = self.begin().await?;
        let add = "UPDATE jobs SET logs = logs || $1 WHERE id = $2 AND epoch = $3 AND status = 'running'";
        let add = self.query(add).bind(storable(text)).bind(claim.job.id.as_str()).bind(claim.job.epoch);
        if add.execute(&mut *transaction).await?.rows_affected() == 0 {
            return Err(Error::Lost);
        }
        self.tell(&mut transaction, &claim.job, Event::Logs).await?;
        transaction.commit().await
    }

    /// Ends a job. An error, and no change, if the claim is lost.
    pub async fn finish(&self, claim: &Claim, outcome: &Outcome) -> Result<Job, Error> {
        let (status, result, code, message) = match outcome {
            Outcome::Succeeded(result) => (Status::Succeeded, Some(result.to_string()), None, None),
            Outcome::Failed { code, message } => (Status::Failed, None, Some(code.clone()), Some(storable(message))),
            Outcome::Canceled => (Status::Canceled, None, None, None),
        };
        let mut transaction = self.begin().await?;
        let end = "UPDATE jobs SET status = $1, result = $2, error_code = $3, error = $4, completed_at = {now}, lease_until = NULL \
             WHERE id = $5 AND epoch = $6 AND status = 'running' RETURNING {columns}";
        let end = self.query(end).bind(status.as_str()).bind(result).bind(code).bind(message);
        let end = end.bind(claim.job.id.as_str()).bind(claim.job.epoch);
        let ended = job(&end.fetch_optional(&mut *transaction).await?.ok_or(Error::Lost)?)?;
        if status == Status::Succeeded {
            self.tell(&mut transaction, &ended, Event::Output).await?;
        }
        self.tell(&mut transaction, &ended, Event::Completed).await?;
        transaction.commit().await?;
        Ok(ended)
    }

    /// Puts a job back that its worker cannot finish, without blame: the worker is being stopped.
    pub async fn release(&self, claim: &Claim) -> Result<(), Error> {
        let back = "UPDATE jobs SET status = 'queued', worker = NULL, lease_until = NULL WHERE id = $1 AND epoch = $2 AND status = 'running'";
        let back = self.query(back).bind(claim.job.id.as_str()).bind(claim.job.epoch);
        if back.execute(&self.pool).await?.rows_affected() == 0 { Err(Error::Lost) } else { Ok(()) }
    }

    /// [`Self::release`] of whatever a worker had that was stopped.
    pub async fn give_back(&self, worker: &str) -> Result<(), Error> {
        let back =
            "UPDATE jobs SET status = 'queued', worker = NULL, lease_until = NULL WHERE worker = $1 AND status = 'running'";
        self.query(back).bind(worker).execute(&self.pool).await?;
        Ok(())
    }

    /// Ends the leases of a worker that is known to be dead, so that nobody waits for them.
    pub async fn abandon(&self, worker: &str) -> Result<(), Error> {
        let end = self.query("UPDATE jobs SET lease_until = 0 WHERE worker = $1 AND status = 'running'").bind(worker);
        end.execute(&self.pool).await?;
        Ok(())
    }

    /// Does what time demands: jobs of dead workers wait again or are given up, deadlines pass, old keys are forgotten. Any process
    /// may call it at any time. Returns the jobs that changed.
    pub async fn reap(&self) -> Result<Vec<Job>, Error> {
        let dead = "status = 'running' AND lease_until < {now}";
        let changes = [
            // Also one that was given back to the queue just when it was canceled.
            format!(
                "UPDATE jobs SET status = 'canceled', completed_at = {{now}} \
                 WHERE {dead} AND stop_asked IS NOT NULL OR status = 'queued' AND stop_asked = 'canceled'"
            ),
            format!(
                "UPDATE jobs SET status = 'failed', completed_at = {{now}}, crashes = crashes + 1, error_code = 'worker_crashed', \
                 error = 'the worker died each time it ran this job' WHERE {dead} AND crashes + 1 >= {}",
                self.limits.crashes
            ),
            format!("UPDATE jobs SET status = 'queued', crashes = crashes + 1, worker = NULL, lease_until = NULL WHERE {dead}"),
            "UPDATE jobs SET status = 'aborted', completed_at = {now}, error_code = 'deadline', \
             error = 'the deadline passed before it began' WHERE status = 'queued' AND deadline < {now}"
                .into(),
        ];
        let mut transaction = self.begin().await?;
        let mut changed = Vec::new();
        for change in changes {
            for row in self.query(&(change + " RETURNING {columns}")).fetch_all(&mut *transaction).await? {
                let job = job(&row)?;
                if job.status.is_final() {
                    self.tell(&mut transaction, &job, Event::Completed).await?;
                }
                changed.push(job);
            }
        }
        let late = "UPDATE jobs SET stop_asked = 'deadline' WHERE status = 'running' AND stop_asked IS NULL AND deadline < {now}";
        self.query(late).execute(&mut *transaction).await?;
        let forget = self.query("DELETE FROM idempotency WHERE created_at < {now} - $1").bind(milliseconds(REMEMBERED));
        forget.execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(changed)
    }

    /// Ends a job that cannot be read: no worker can run it, and none must stop at it.
    async fn give_up(&self, connection: &mut AnyConnection, id: &str) -> Result<(), Error> {
        tracing::error!(job = id, "what is stored of the job cannot be read: it fails");
        let end = "UPDATE jobs SET status = 'failed', completed_at = {now}, lease_until = NULL, error_code = 'internal', \
             error = 'what is stored of this job cannot be read: send it again' WHERE id = $1 RETURNING {columns}";
        let row = self.query(end).bind(id).fetch_one(&mut *connection).await?;
        match job(&row) {
            Ok(ended) => self.tell(connection, &ended, Event::Completed).await,
            Err(_) => Ok(()),
        }
    }

    /// Writes an event for the job's webhook, if that wants it.
    async fn tell(&self, connection: &mut AnyConnection, job: &Job, event: Event) -> Result<(), Error> {
        if job.webhook.as_ref().is_some_and(|webhook| webhook.events.contains(&event)) {
            let after = if event == Event::Logs { milliseconds(TOGETHER) } else { 0 };
            // One that is being told is told again if it grew meanwhile.
            let tell = format!(
                "INSERT INTO outbox (job, event, next_at, logged) \
                 SELECT id, $1, {{now}} + {after}, LENGTH(logs) FROM jobs WHERE id = $2 \
                 ON CONFLICT (job, event) DO UPDATE SET logged = excluded.logged"
            );
            self.query(&tell).bind(event.as_str()).bind(job.id.as_str()).execute(connection).await?;
        }
        Ok(())
    }
}

pub(super) fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// PostgreSQL has no texts with NUL in them.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
