//! The durable queue, the same tests on SQLite and on a real PostgreSQL.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use darkroom::jobs::{Claim, Delivery, Error, Event, Job, Limits, NewJob, Outcome, Status, Stop, Store, Webhook};
use serde_json::json;

const LEASE: Duration = Duration::from_secs(60);

/// A server of our own, started once, stopped with the process group's end.
pub(crate) struct Postgres {
    address: String,
}

impl Postgres {
    /// `None` where PostgreSQL is not installed.
    pub(crate) fn get() -> Option<&'static Self> {
        static SERVER: OnceLock<Option<Postgres>> = OnceLock::new();
        SERVER.get_or_init(Self::start).as_ref()
    }

    fn start() -> Option<Self> {
        let bin = [
            "/usr/lib/postgresql/17/bin",
            "/usr/lib/postgresql/16/bin",
            "/usr/lib/postgresql/15/bin",
            "/usr/local/bin",
            "/usr/bin",
        ]
        .map(PathBuf::from)
        .into_iter()
        .find(|bin| bin.join("initdb").exists() && bin.join("postgres").exists())?;
        let folder = tempfile::Builder::new().prefix("darkroom-postgres").tempdir().unwrap().keep();
        // It refuses to run as root.
        let root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout.starts_with(b"0\n"));
        let program = |name: &str| {
            let mut command = Command::new(if root { "runuser".into() } else { bin.join(name) });
            if root {
                Command::new("chown").arg("postgres").arg(&folder).status().unwrap();
                command.args(["-u", "postgres", "--"]).arg(bin.join(name));
            }
            command.current_dir("/").stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let data = folder.join("data");
        assert!(program("initdb").args(["--no-sync", "-U", "postgres", "-D"]).arg(&data).status().unwrap().success());
        let mut server = program("postgres");
        server
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=300", "-D"])
            .arg(&data)
            .arg("-k")
            .arg(&folder);
        let server = server.spawn().unwrap().id();
        let encoded = folder.display().to_string().replace('/', "%2F");
        let address = format!("postgres://postgres@{encoded}");
        for _ in 0..200 {
            if folder.join(".s.PGSQL.5432").exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // The test process does not run destructors of statics: whoever outlives it ends the server.
        let watch = format!(
            "(while kill -0 {} 2>/dev/null; do sleep 1; done; pkill -P {server}; kill {server}; sleep 1; rm -rf {}) >/dev/null 2>&1 &",
            std::process::id(),
            folder.display()
        );
        Command::new("sh").args(["-c", &watch]).stdin(Stdio::null()).status().unwrap();
        Some(Self { address })
    }

    /// An empty database.
    pub(crate) async fn database(&self) -> String {
        use sqlx::Executor;
        sqlx::any::install_default_drivers();
        let name = format!("t{}", uuid::Uuid::now_v7().simple());
        let pool = sqlx::AnyPool::connect(&format!("{}/postgres", self.address)).await.unwrap();
        pool.execute(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.unwrap();
        format!("{}/{name}", self.address)
    }
}

/// Runs a test on a fresh store of each kind.
pub(crate) fn on_both<F: Future<Output = ()>>(limits: impl Fn() -> Limits, test: impl Fn(Store, String) -> F) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("sqlite:{}", folder.path().join("jobs.db").display());
        test(Store::open(&address, limits()).await.unwrap(), address).await;
        match Postgres::get() {
            Some(server) => {
                let address = server.database().await;
                test(Store::open(&address, limits()).await.unwrap(), address).await;
            }
            None => println!("PostgreSQL is not installed: only SQLite was tested"),
        }
    });
}

pub(crate) fn new(tenant: &str, affinity: &str) -> NewJob {
    let request = json!({"prompt": "a cat", "seed": 5});
    NewJob {
        tenant: tenant.into(),
        base: String::new(),
        request,
        affinity: affinity.into(),
        within: None,
        webhook: None,
        idempotency: None,
    }
}

pub(crate) async fn claim(store: &Store, worker: &str) -> Option<Claim> {
    store.claim(worker, "", &[], &[], LEASE).await.unwrap()
}

pub(crate) fn done() -> Outcome {
    Outcome::Succeeded(json!({"files": ["out-0.webp"]}))
}

/// Whenever a job was made.
pub(crate) const EVER: std::ops::Range<i64> = i64::MIN..i64::MAX;

/// What is to be told, whosever it is.
pub(crate) async fn all_due(store: &Store, limit: i64) -> Vec<(Delivery, Job)> {
    store.due(limit, limit, &BTreeMap::new()).await.unwrap()
}

#[test]
fn a_job_from_acceptance_to_its_end() {
    on_both(Limits::default, |store, address| async move {
        let (accepted, fresh) = store.submit(&new("me", "")).await.unwrap();
        assert!(fresh && accepted.status == Status::Queued && accepted.created_at > 1_700_000_000_000);
        // Committed: another process sees it.
        let other = Store::open(&address, Limits::default()).await.unwrap();
        assert_eq!(other.get("me", &accepted.id).await.unwrap().unwrap().request["seed"], 5);
        assert!(other.get("you", &accepted.id).await.unwrap().is_none(), "not another tenant's");
        assert!(other.cancel("you", &accepted.id).await.unwrap().is_none());

        let held = claim(&other, "w1").await.unwrap();
        assert_eq!((held.job.id.clone(), held.job.status, held.job.epoch), (accepted.id.clone(), Status::Running, 1));
        assert!(claim(&store, "w2").await.is_none());
        assert_eq!(other.heartbeat(&held, LEASE, Some(&json!({"step": 3}))).await.unwrap(), None);
        other.log(&held, "Using seed: 5\n").await.unwrap();
        other.log(&held, " 50%|#####     | 3/6\n").await.unwrap();
        let seen = store.get("me", &accepted.id).await.unwrap().unwrap();
        assert_eq!(seen.progress.unwrap()["step"], 3);
        assert!(seen.logs.starts_with("Using seed: 5\n 50%"));

        let ended = other.finish(&held, &done()).await.unwrap();
        assert_eq!((ended.status, ended.result.unwrap()["files"][0].as_str()), (Status::Succeeded, Some("out-0.webp")));
        assert!(ended.completed_at >= ended.started_at && ended.started_at >= Some(ended.created_at));
        // There is one end.
        for late in
            [other.finish(&held, &Outcome::Canceled).await.map(drop), other.log(&held, "x").await, other.release(&held).await]
        {
            assert!(matches!(late, Err(Error::Lost)));
        }
        assert!(matches!(other.heartbeat(&held, LEASE, None).await, Err(Error::Lost)));
        assert_eq!(store.cancel("me", &accepted.id).await.unwrap().unwrap().status, Status::Succeeded);
    });
}

#[test]
fn a_dead_workers_job_is_run_again_and_given_up_in_the_end() {
    on_both(Limits::default, |store, _| async move {
        let id = store.submit(&new("me", "")).await.unwrap().0.id;
        let mut old = Vec::new();
        for run in 1..=3 {
            let held = store.claim("w", "", &[], &[], Duration::from_millis(1)).await.unwrap().unwrap();
            assert_eq!(held.job.epoch, run);
            old.push(held);
            tokio::time::sleep(Duration::from_millis(20)).await;
            let changed = store.reap().await.unwrap();
            assert_eq!(changed.len(), 1);
            assert_eq!(changed[0].status, if run < 3 { Status::Queued } else { Status::Failed });
        }
        let job = store.get("me", &id).await.unwrap().unwrap();
        assert_eq!(job.error_code.as_deref(), Some("worker_crashed"));
        // A worker that comes back from the dead changes nothing.
        for held in &old {
            assert!(matches!(store.finish(held, &done()).await, Err(Error::Lost)));
        }
        // Being stopped is no crash.
        let id = store.submit(&new("me", "")).await.unwrap().0.id;
        for _ in 0..5 {
            let held = claim(&store, "w").await.unwrap();
            store.release(&held).await.unwrap();
        }
        // Nor is being killed for not ending in time.
        for _ in 0..5 {
            claim(&store, "w").await.unwrap();
            store.give_back("another").await.unwrap();
            assert!(claim(&store, "w").await.is_none());
            store.give_back("w").await.unwrap();
        }
        assert_eq!(store.get("me", &id).await.unwrap().unwrap().status, Status::Queued);
        // A job that was canceled and then given back does not begin again.
        let held = claim(&store, "w").await.unwrap();
        store.cancel("me", &id).await.unwrap();
        store.release(&held).await.unwrap();
        let reaped = store.reap().await.unwrap();
        assert!(reaped.iter().any(|job| job.id == id && job.status == Status::Canceled), "{reaped:?}");
        store.submit(&new("me", "")).await.unwrap();
        // A newer claim fences the older one, although both are of one job.
        let first = store.claim("w1", "", &[], &[], Duration::from_millis(1)).await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        store.reap().await.unwrap();
        let second = claim(&store, "w2").await.unwrap();
        assert!(matches!(store.finish(&first, &Outcome::Canceled).await, Err(Error::Lost)));
        assert_eq!(store.finish(&second, &done()).await.unwrap().status, Status::Succeeded);
    });
}

/// More than there are connections to the database, so that none may hold one and wait for another.
#[test]
fn many_cancel_what_has_ended_at_once() {
    on_both(Limits::default, |store, _| async move {
        let id = store.submit(&new("me", "")).await.unwrap().0.id;
        store.cancel("me", &id).await.unwrap();
        let cancels = (0..40).map(|_| store.cancel("me", &id));
        for canceled in futures_util::future::join_all(cancels).await {
            assert_eq!(canceled.unwrap().unwrap().status, Status::Canceled);
        }
    });
}

#[test]
fn stopping_and_deadlines() {
    on_both(Limits::default, |store, _| async move {
        let queued = store.submit(&new("me", "")).await.unwrap().0.id;
        assert_eq!(store.cancel("me", &queued).await.unwrap().unwrap().status, Status::Canceled);
        assert!(claim(&store, "w").await.is_none());

        let running = store.submit(&new("me", "")).await.unwrap().0.id;
        let held = claim(&store, "w").await.unwrap();
        assert_eq!(store.cancel("me", &running).await.unwrap().unwrap().status, Status::Running);
        assert_eq!(store.heartbeat(&held, LEASE, None).await.unwrap(), Some(Stop::Asked));
        assert_eq!(store.finish(&held, &Outcome::Canceled).await.unwrap().status, Status::Canceled);

        // A worker that died while it should have stopped: the job is not run again.
        let id = store.submit(&new("me", "")).await.unwrap().0.id;
        store.claim("w", "", &[], &[], Duration::from_millis(1)).await.unwrap().unwrap();
        store.cancel("me", &id).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(store.reap().await.unwrap()[0].status, Status::Canceled);

        let soon = NewJob { within: Some(1), ..new("me", "") };
        let (late, _) = store.submit(&soon).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(store.reap().await.unwrap()[0].status, Status::Aborted);
        assert_eq!(store.get("me", &late.id).await.unwrap().unwrap().error_code.as_deref(), Some("deadline"));
        let begun = Instant::now();
        store.submit(&NewJob { within: Some(2000), ..new("me", "") }).await.unwrap();
        let held = claim(&store, "w").await.unwrap();
        let first = store.heartbeat(&held, LEASE, None).await.unwrap();
        assert!(first.is_none() || begun.elapsed() > Duration::from_millis(1500), "{first:?}");
        tokio::time::sleep(Duration::from_millis(2100)).await;
        assert_eq!(store.heartbeat(&held, LEASE, None).await.unwrap(), Some(Stop::Deadline));
    });
}

#[test]
fn tenants_take_turns_and_warm_adapters_go_first_for_a_while() {
    let limits = || Limits { window: 3, patience: Duration::from_secs(6), ..Limits::default() };
    on_both(limits, |store, _| async move {
        for _ in 0..4 {
            store.submit(&new("flood", "")).await.unwrap();
        }
        store.submit(&new("late", "")).await.unwrap();
        store.submit(&new("later", "")).await.unwrap();
        let mut turns = Vec::new();
        while let Some(held) = claim(&store, "w").await {
            turns.push(held.job.tenant.clone());
            // So that two starts are not in the same millisecond.
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        assert_eq!(turns, ["flood", "late", "later", "flood", "flood", "flood"]);

        for affinity in ["a", "b", "a", "c"] {
            store.submit(&new("me", affinity)).await.unwrap();
        }
        let warm = |sets: &[&str]| sets.iter().map(|set| (*set).to_owned()).collect::<Vec<_>>();
        let next = |sets: Vec<String>| {
            let store = store.clone();
            async move { store.claim("w", "", &sets, &[], LEASE).await.unwrap().map(|held| held.job.affinity) }
        };
        // c is behind the window of three; the rest goes by warmth, then age.
        assert_eq!(next(warm(&["c", "b"])).await.as_deref(), Some("b"));
        assert_eq!(next(warm(&["x"])).await.as_deref(), Some("a"));
        // After a while nobody is passed over any more.
        tokio::time::sleep(Duration::from_millis(6100)).await;
        store.submit(&new("me", "c")).await.unwrap();
        assert_eq!(next(warm(&["c"])).await.as_deref(), Some("a"));
        assert_eq!(next(warm(&["c"])).await.as_deref(), Some("c"));
    });
}

#[test]
fn full_queues_and_repeated_requests() {
    let limits = || Limits { waiting: 5, waiting_of_tenant: 3, ..Limits::default() };
    on_both(limits, |store, _| async move {
        let keyed = |body: &str| NewJob { idempotency: Some(("key-1".into(), body.into())), ..new("me", "") };
        let (first, fresh) = store.submit(&keyed("sha-a")).await.unwrap();
        let (again, repeated) = store.submit(&keyed("sha-a")).await.unwrap();
        assert!(fresh && !repeated && first.id == again.id);
        assert!(matches!(store.submit(&keyed("sha-b")).await, Err(Error::Conflict)));
        // Another tenant's key is another key.
        let (theirs, fresh) = store.submit(&NewJob { tenant: "you".into(), ..keyed("sha-b") }).await.unwrap();
        assert!(fresh && theirs.id != first.id);

        for _ in 0..2 {
            store.submit(&new("me", "")).await.unwrap();
        }
        assert!(matches!(store.submit(&new("me", "")).await, Err(Error::TenantFull(3))));
        store.submit(&new("you", "")).await.unwrap();
        assert!(matches!(store.submit(&new("they", "")).await, Err(Error::Full(5))));
        let mine = store.list("me", EVER, None, 2).await.unwrap();
        assert!(mine.len() == 2 && mine[0].id > mine[1].id);
        let rest = store.list("me", EVER, Some(&mine[1].id), 100).await.unwrap();
        assert_eq!(rest.iter().map(|job| &job.id).collect::<Vec<_>>(), [&first.id]);
        assert_eq!(store.ahead(&mine[0].id).await.unwrap(), 3);
    });
}

#[test]
fn webhooks_hear_what_they_asked_for_until_they_have_it() {
    on_both(Limits::default, |store, _| async move {
        let webhook = |events: &[Event]| Some(Webhook { url: "https://example.com/hook".into(), events: events.to_vec() });
        store.submit(&NewJob { webhook: webhook(&Event::ALL), ..new("me", "") }).await.unwrap();
        store.submit(&NewJob { webhook: webhook(&[Event::Completed]), ..new("me", "") }).await.unwrap();
        store.submit(&new("me", "")).await.unwrap();
        for _ in 0..3 {
            let held = claim(&store, "w").await.unwrap();
            store.log(&held, "a\n").await.unwrap();
            store.log(&held, "b\n").await.unwrap();
            store.finish(&held, &done()).await.unwrap();
        }
        // Log lines are told half a second later, those in between with them.
        tokio::time::sleep(Duration::from_millis(600)).await;
        let due = all_due(&store, 100).await;
        let events: Vec<_> = due.iter().map(|(delivery, job)| (delivery.event, job.status)).collect();
        assert_eq!(events.len(), 5);
        assert!(events.iter().all(|(_, status)| *status == Status::Succeeded), "{events:?}");
        assert_eq!(events.iter().filter(|(event, _)| *event == Event::Completed).count(), 2);
        // Taken: another process does not tell them a second time at once.
        assert!(all_due(&store, 100).await.is_empty());
        for (delivery, _) in &due {
            if delivery.event == Event::Completed {
                store.undelivered(delivery, Duration::from_secs(5)).await.unwrap();
            } else {
                store.delivered(delivery).await.unwrap();
            }
        }
        assert!(all_due(&store, 100).await.is_empty());
        tokio::time::sleep(Duration::from_millis(5100)).await;
        let again = all_due(&store, 100).await;
        assert!(again.len() == 2 && again.iter().all(|(delivery, _)| delivery.attempts == 1));
        for (delivery, _) in &again {
            store.delivered(delivery).await.unwrap();
        }
        // A job that was never begun has an end as well.
        let id = store.submit(&NewJob { webhook: webhook(&[Event::Completed]), ..new("me", "") }).await.unwrap().0.id;
        store.cancel("me", &id).await.unwrap();
        assert_eq!(all_due(&store, 10).await[0].1.status, Status::Canceled);
    });
}

#[test]
fn many_workers_some_of_which_die_do_every_job_once() {
    const JOBS: usize = 200;
    on_both(Limits::default, |store, address| async move {
        let limits = || Limits { waiting: 10_000, waiting_of_tenant: 10_000, ..Limits::default() };
        let store = {
            drop(store);
            Store::open(&address, limits()).await.unwrap()
        };
        let mut ids = BTreeSet::new();
        for i in 0..JOBS {
            ids.insert(store.submit(&new(&format!("tenant-{}", i % 5), &format!("set-{}", i % 7))).await.unwrap().0.id);
        }
        let mut workers = Vec::new();
        for w in 0..8 {
            let store = store.clone();
            workers.push(tokio::spawn(async move {
                let (mut finished, mut seen) = (Vec::new(), 0);
                loop {
                    match store.claim(&format!("w{w}"), "", &[format!("set-{w}")], &[], Duration::from_secs(1)).await.unwrap() {
                        Some(held) => {
                            seen += 1;
                            // Every third time these die with the job in hand.
                            if w < 3 && seen % 3 == 0 {
                                continue;
                            }
                            if store.finish(&held, &done()).await.is_ok() {
                                finished.push(held.job.id);
                            }
                        }
                        None if store.reap().await.unwrap().is_empty()
                            && store.ahead(&darkroom::jobs::JobId::new()).await.unwrap() == 0 =>
                        {
                            tokio::time::sleep(Duration::from_millis(1200)).await;
                            if store.reap().await.unwrap().is_empty() {
                                return finished;
                            }
                        }
                        None => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            }));
        }
        let mut finished: BTreeMap<_, usize> = BTreeMap::new();
        for worker in workers {
            for id in worker.await.unwrap() {
                *finished.entry(id).or_default() += 1;
            }
        }
        assert!(finished.values().all(|times| *times == 1), "no job ended twice");
        let mut failed = 0;
        for i in 0..5 {
            for job in store.list(&format!("tenant-{i}"), EVER, None, 1000).await.unwrap() {
                assert!(job.status.is_final(), "{:?}", job.status);
                assert_eq!(job.status == Status::Succeeded, finished.contains_key(&job.id));
                failed += usize::from(job.status == Status::Failed);
                ids.remove(&job.id);
            }
        }
        assert!(ids.is_empty() && finished.len() + failed == JOBS && failed < JOBS / 10, "{failed} were given up");
    });
}

#[test]
fn a_database_of_the_future_is_left_alone() {
    on_both(Limits::default, |store, address| async move {
        drop(store);
        let pool = sqlx::AnyPool::connect(&address).await.unwrap();
        sqlx::query("UPDATE schema_version SET version = 99").execute(&pool).await.unwrap();
        let error = Store::open(&address, Limits::default()).await.unwrap_err();
        assert!(matches!(error, Error::Newer { found: 99, .. }), "{error}");
        for address in ["mysql://x", "jobs.db", ""] {
            assert!(matches!(Store::open(address, Limits::default()).await, Err(Error::Address(_))));
        }
    });
}
