//! What the service keeps beside the queue, on SQLite and PostgreSQL: keys, uploads, what ended, what grew old.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use darkroom::jobs::{Error, Event, JobId, Limits, NewJob, NewUpload, Status, Store, Webhook};
use serde_json::json;

use crate::jobs::{all_due, claim, done, new, on_both};

#[test]
fn a_database_of_an_older_version_is_copied_and_brought_forward() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        use sqlx::Executor;
        let folder = tempfile::tempdir().unwrap();
        let address = format!("sqlite:{}", folder.path().join("jobs.db").display());
        sqlx::any::install_default_drivers();
        let pool = sqlx::AnyPool::connect(&format!("{address}?mode=rwc")).await.unwrap();
        // As the first version left it, with a job that waits.
        let first = include_str!("../../src/jobs/migrations/0001_jobs.sql");
        for statement in first.split(";\n").filter(|part| part.contains("CREATE")) {
            pool.execute(statement).await.unwrap();
        }
        for statement in [
            "CREATE TABLE schema_version (version BIGINT NOT NULL)",
            "INSERT INTO schema_version VALUES (1)",
            "INSERT INTO jobs (id, tenant, status, request, affinity, created_at) \
             VALUES ('01m7yqeftae4rvn2akdv04dse4', 'me', 'queued', '{\"seed\":9}', '', 1)",
            "INSERT INTO outbox (job, event, next_at) VALUES ('01m7yqeftae4rvn2akdv04dse4', 'logs', 1)",
        ] {
            pool.execute(statement).await.unwrap();
        }
        pool.close().await;
        // An upgrade that was interrupted left what it had copied; and so did one that ended, of a version that was taken back.
        for left in ["jobs.before-3.part", "jobs.before-3.db"] {
            std::fs::write(folder.path().join(left), b"cut off").unwrap();
        }
        let store = Store::open(&address, Limits::default()).await.unwrap();
        assert_eq!(claim(&store, "w").await.unwrap().job.request["seed"], 9);
        assert!(!store.has_keys().await.unwrap());
        assert_eq!(all_due(&store, 9).await[0].0.event, Event::Logs);
        let copy = format!("sqlite:{}", folder.path().join("jobs.before-3.db").display());
        let copy = sqlx::AnyPool::connect(&copy).await.unwrap();
        let status = sqlx::query("SELECT status FROM jobs").fetch_one(&copy).await.unwrap();
        assert_eq!(sqlx::Row::get::<String, _>(&status, 0), "queued", "the copy is as it was");
        assert!(!folder.path().join("jobs.before-3.part").exists());
        // Opened again there is nothing to do.
        Store::open(&address, Limits::default()).await.unwrap();
    });
}

#[test]
fn keys_are_their_owners_until_they_are_revoked() {
    on_both(Limits::default, |store, address| async move {
        assert!(!store.has_keys().await.unwrap());
        let (made, text) = store.create_key("alice", "laptop", false).await.unwrap();
        let (root, _) = store.create_key("ops", "", true).await.unwrap();
        assert!(store.has_keys().await.unwrap() && root.admin && !made.admin);
        let other = Store::open(&address, Limits::default()).await.unwrap();
        assert_eq!(other.key(&text).await.unwrap(), Some(made.clone()));
        for wrong in [
            String::new(),
            "dk".into(),
            text[..text.len() - 1].into(),
            format!("{text}a"),
            otherwise_ended(&text),
            text.replace(&made.id, &root.id),
            text.replacen("dk_", "dk_'", 1),
            "é".repeat(100_000),
        ] {
            assert_eq!(other.key(&wrong).await.unwrap(), None, "{wrong:.80}");
        }
        let secret = text.rsplit_once(&made.id).unwrap().1;
        assert_eq!(store.keys().await.unwrap(), [made.clone(), root]);
        assert!(!format!("{:?}", store.keys().await.unwrap()).contains(&secret[1..]));
        assert!(store.revoke_key(&made.id).await.unwrap().unwrap().revoked_at.is_some());
        assert_eq!((other.key(&text).await.unwrap(), store.revoke_key("nobody").await.unwrap()), (None, None));
        assert!(store.has_keys().await.unwrap(), "a revoked key does not open the door for all");
    });
}

/// The same with another last character.
fn otherwise_ended(text: &str) -> String {
    let (rest, last) = text.split_at(text.len() - 1);
    format!("{rest}{}", if last == "A" { "E" } else { "A" })
}

/// A file of three bytes.
pub(crate) fn file(tenant: &str, lives: i64) -> NewUpload {
    NewUpload {
        tenant: tenant.into(),
        name: "me.png".into(),
        content_type: "image/png".into(),
        size: 3,
        sha256: "00".into(),
        metadata: json!({"a": 1}),
        lives,
    }
}

#[test]
fn uploads_of_a_tenant_take_no_more_room_than_they_may() {
    let limits = || Limits { files_of_tenant: 7, ..Limits::default() };
    on_both(limits, |store, _| async move {
        let (first, second) = (JobId::new(), JobId::new());
        store.add_upload(&first, &file("me", 60_000)).await.unwrap();
        // It takes room until it is removed, not until its time is over.
        store.add_upload(&second, &file("me", -1)).await.unwrap();
        let refused = store.add_upload(&JobId::new(), &file("me", 60_000)).await;
        assert!(matches!(refused, Err(Error::FilesFull(7))), "{refused:?}");
        store.add_upload(&JobId::new(), &file("you", 60_000)).await.unwrap();
        store.forget_upload(&second).await.unwrap();
        store.add_upload(&JobId::new(), &file("me", 60_000)).await.unwrap();
    });
}

#[test]
fn uploads_belong_to_their_tenant_and_end() {
    on_both(Limits::default, |store, _| async move {
        let (id, gone) = (JobId::new(), JobId::new());
        let stored = store.add_upload(&id, &file("me", 60_000)).await.unwrap();
        store.add_upload(&gone, &file("me", -1)).await.unwrap();
        assert_eq!(
            (store.upload("me", &id).await.unwrap(), stored.expires_at - stored.created_at),
            (Some(stored.clone()), 60_000)
        );
        assert_eq!(store.upload("you", &id).await.unwrap(), None);
        assert_eq!(store.upload("me", &gone).await.unwrap(), None);
        assert_eq!(store.uploads("me", None, 10).await.unwrap(), [stored]);
        assert_eq!(store.expired_uploads().await.unwrap(), std::slice::from_ref(&gone));
        store.forget_upload(&gone).await.unwrap();
        assert_eq!(store.expired_uploads().await.unwrap(), []);
        assert!(!store.remove_upload("you", &id).await.unwrap() && store.remove_upload("me", &id).await.unwrap());
        assert_eq!(store.uploads("me", None, 10).await.unwrap(), []);
    });
}

#[test]
fn what_ended_what_waits_and_what_grew_old() {
    on_both(Limits::default, |store, _| async move {
        let begun = store.now().await.unwrap();
        let (first, _) = store.submit(&new("me", "")).await.unwrap();
        let (second, _) = store.submit(&new("you", "")).await.unwrap();
        let held = claim(&store, "w").await.unwrap();
        let waiting = store.waiting().await.unwrap();
        assert_eq!((waiting.queued, waiting.running, waiting.untold), (1, 1, 0));
        assert_eq!(store.upcoming("", 5).await.unwrap(), std::slice::from_ref(&second.id));
        store.log(&held, "secret prompt\n").await.unwrap();
        store.finish(&held, &done()).await.unwrap();
        let ended = store.ended(begun).await.unwrap();
        assert!(ended.jobs == [first.id.clone()] && ended.now >= begun);
        assert_eq!(store.ended(ended.now + 1).await.unwrap().jobs, []);

        let hour = Duration::from_secs(3600);
        assert!(store.old(hour).await.unwrap().is_empty(), "too young");
        tokio::time::sleep(Duration::from_millis(5)).await;
        let old = store.old(Duration::ZERO).await.unwrap();
        assert_eq!(old.iter().map(|job| &job.id).collect::<Vec<_>>(), [&first.id], "what waits stays");
        store.strip(&old[0], &["seed"], false).await.unwrap();
        let left = store.old(Duration::ZERO).await.unwrap();
        assert!(left.len() == 1 && left[0].data_removed && left[0].logs.is_empty(), "its files are left: {left:?}");
        assert_eq!(store.forget(Duration::ZERO).await.unwrap(), 0);
        store.strip(&left[0], &["seed"], true).await.unwrap();
        assert!(store.old(Duration::ZERO).await.unwrap().is_empty());
        let left = store.get("me", &first.id).await.unwrap().unwrap();
        assert!(left.data_removed && left.logs.is_empty() && left.result.is_none() && left.status == Status::Succeeded);
        assert_eq!(left.request, json!({"seed": 5}));
        assert_eq!((store.forget(hour).await.unwrap(), store.forget(Duration::ZERO).await.unwrap()), (0, 1));
        assert!(store.get("me", &first.id).await.unwrap().is_none());
        // With the job its key is forgotten.
        let keyed = NewJob { idempotency: Some(("k".into(), "b".into())), ..new("me", "") };
        let (once, _) = store.submit(&keyed).await.unwrap();
        assert_eq!(store.submit(&keyed).await.unwrap().0.id, once.id);
        store.cancel("me", &once.id).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        store.strip(&store.old(Duration::ZERO).await.unwrap()[0], &[], true).await.unwrap();
        assert_eq!(store.forget(Duration::ZERO).await.unwrap(), 1);
        assert_ne!(store.submit(&keyed).await.unwrap().0.id, once.id);
    });
}

#[test]
fn a_job_that_kills_workers_waits_until_no_other_does() {
    on_both(Limits::default, |store, _| async move {
        let (killer, _) = store.submit(&new("me", "")).await.unwrap();
        for _ in 0..2 {
            assert_eq!(claim(&store, "w").await.unwrap().job.id, killer.id);
            store.abandon("w").await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
            store.reap().await.unwrap();
        }
        let (mine, _) = store.submit(&new("me", "")).await.unwrap();
        let (yours, _) = store.submit(&new("you", "")).await.unwrap();
        let order = [claim(&store, "w").await, claim(&store, "w").await, claim(&store, "w").await];
        let order: Vec<_> = order.into_iter().map(|claim| claim.unwrap().job.id).collect();
        assert_eq!(order, [yours.id, mine.id, killer.id], "whoever waited longest since the last start, then the rest");
    });
}

#[test]
fn who_is_alone_takes_over_what_the_dead_held() {
    on_both(Limits::default, |store, address| async move {
        let webhook = Webhook { url: "https://example.com/".into(), events: vec![Event::Start] };
        let (job, _) = store.submit(&NewJob { webhook: Some(webhook), ..new("me", "") }).await.unwrap();
        let held = claim(&store, "w").await.unwrap();
        assert_eq!(all_due(&store, 9).await.len(), 1);
        store.take_over().await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
        store.reap().await.unwrap();
        let (now, due) = (store.get("me", &job.id).await.unwrap().unwrap(), all_due(&store, 9).await.len());
        let file = address.starts_with("sqlite:");
        // Of a shared database nobody knows who else is at it.
        assert_eq!((now.status, due), if file { (Status::Queued, 1) } else { (Status::Running, 0) });
        assert_eq!(store.finish(&held, &done()).await.is_ok(), !file);
    });
}

#[test]
fn what_is_logged_while_logs_are_told_is_told_next() {
    on_both(Limits::default, |store, _| async move {
        let webhook = Webhook { url: "https://example.com/".into(), events: vec![Event::Logs] };
        store.submit(&NewJob { webhook: Some(webhook), ..new("me", "") }).await.unwrap();
        let held = claim(&store, "w").await.unwrap();
        let next = async || {
            // Log lines are told half a second later.
            tokio::time::sleep(Duration::from_millis(600)).await;
            let mut due = all_due(&store, 9).await;
            assert_eq!(due.len(), 1, "{due:?}");
            due.remove(0)
        };
        store.log(&held, "é\n").await.unwrap();
        let (first, _) = next().await;
        store.log(&held, "two\n").await.unwrap();
        let delivered = Instant::now();
        store.delivered(&first).await.unwrap();
        let at_once = all_due(&store, 9).await;
        if delivered.elapsed() > Duration::from_millis(400) {
            // This machine is too busy to tell.
            return;
        }
        assert!(at_once.is_empty(), "at most every half second");
        let (second, job) = next().await;
        assert_eq!(job.logs, "é\ntwo\n");
        store.delivered(&second).await.unwrap();
        assert_eq!(store.waiting().await.unwrap().untold, 0);
        // What tells deliveries apart goes on where it was.
        store.log(&held, "three\n").await.unwrap();
        let (third, _) = next().await;
        assert_eq!([first.logged, second.logged, third.logged], [2, 6, 12]);
    });
}

#[test]
fn webhooks_of_one_tenant_leave_room_for_those_of_others() {
    on_both(Limits::default, |store, _| async move {
        let ended = async |tenant: &str| {
            let webhook = Some(Webhook { url: "https://example.com/".into(), events: vec![Event::Completed] });
            let (job, _) = store.submit(&NewJob { webhook, ..new(tenant, "") }).await.unwrap();
            store.cancel(tenant, &job.id).await.unwrap();
        };
        let tenants = async |limit: i64, telling: &[(&str, i64)]| -> Vec<String> {
            let telling = telling.iter().map(|(tenant, n)| ((*tenant).to_owned(), *n)).collect();
            let mut due: Vec<_> = store.due(limit, 4, &telling).await.unwrap().into_iter().map(|(_, job)| job.tenant).collect();
            due.sort();
            due
        };
        for _ in 0..12 {
            ended("flood").await;
        }
        ended("late").await;
        ended("later").await;
        // Twelve wait longer, and still the others have their places.
        assert_eq!(tenants(3, &[]).await, ["flood", "late", "later"]);
        assert_eq!(tenants(32, &[("flood", 1), ("late", 1)]).await, ["flood"; 3]);
        ended("late").await;
        assert_eq!(tenants(32, &[("flood", 4), ("late", 1)]).await, ["late"]);
        assert_eq!(tenants(32, &[("flood", 4)]).await, Vec::<String>::new());
        // Each is taken once, whoever asks at the same time.
        let other = store.clone();
        let none = BTreeMap::new();
        let (one, two) = tokio::join!(store.due(32, 32, &none), other.due(32, 32, &none));
        let (one, two) = (one.unwrap(), two.unwrap());
        let all: BTreeSet<_> = one.iter().chain(&two).map(|(delivery, _)| delivery.job.clone()).collect();
        assert_eq!((one.len() + two.len(), all.len()), (8, 8));
    });
}

#[test]
fn a_jobs_key_is_found_again() {
    on_both(Limits::default, |store, _| async move {
        let keyed = NewJob { idempotency: Some(("cog:order-4711".into(), "b".into())), ..new("me", "") };
        let (named, _) = store.submit(&keyed).await.unwrap();
        let (other, _) = store.submit(&new("me", "")).await.unwrap();
        assert_eq!(store.key_of(&named, "cog:").await.unwrap().as_deref(), Some("cog:order-4711"));
        assert_eq!((store.key_of(&named, "x").await.unwrap(), store.key_of(&other, "cog:").await.unwrap()), (None, None));
    });
}
