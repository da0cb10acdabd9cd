//! What one caller sends must neither stop the queue nor fill the database, on SQLite and PostgreSQL.

use std::collections::BTreeSet;

use darkroom::jobs::{Error, Event, JobId, Limits, NewJob, OwnModel, Status, Webhook};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::jobs::{EVER, all_due, claim, new, on_both};
use crate::jobs_service::file;

/// Readers of JSON give up at this.
fn deep() -> Value {
    (0..130).fold(json!(1), |inner, _| json!([inner]))
}

#[test]
fn a_job_that_cannot_be_stored_takes_no_other_with_it() {
    on_both(Limits::default, |store, _| async move {
        let bad = NewJob { request: json!({ "input": deep() }), idempotency: Some(("k".into(), "b".into())), ..new("me", "") };
        let jobs = [new("me", ""), bad.clone(), new("me", ""), new("you", ""), bad, new("me", "")];
        // At once, so that some share a commit.
        let answers = join_all(jobs.iter().map(|job| store.submit(job))).await;
        for (i, answer) in answers.iter().enumerate() {
            match answer {
                Ok((_, fresh)) => assert!(*fresh && i != 1 && i != 4),
                Err(error) => assert!(matches!(error, Error::Damaged("request")) && (i == 1 || i == 4), "{i}: {error}"),
            }
        }
        assert_eq!((store.list("me", EVER, None, 9).await.unwrap().len(), store.waiting().await.unwrap().queued), (3, 4));
        assert!(store.keyed("me", "k").await.unwrap().is_none(), "its key is free");
        for _ in 0..4 {
            assert!(claim(&store, "w").await.is_some());
        }
        assert!(claim(&store, "w").await.is_none());
    });
}

#[test]
fn a_job_that_cannot_be_read_fails_and_stops_nobody() {
    on_both(Limits::default, |store, address| async move {
        let webhook = Webhook { url: "https://example.com/".into(), events: vec![Event::Completed] };
        let (damaged, _) = store.submit(&NewJob { webhook: Some(webhook), ..new("me", "") }).await.unwrap();
        let (late, _) = store.submit(&NewJob { within: Some(1), ..new("me", "") }).await.unwrap();
        let (good, _) = store.submit(&new("me", "")).await.unwrap();
        let pool = sqlx::AnyPool::connect(&address).await.unwrap();
        for id in [&damaged.id, &late.id] {
            let damage = sqlx::query("UPDATE jobs SET request = $1, progress = '{', result = '[' WHERE id = $2");
            damage.bind(deep().to_string()).bind(id.as_str()).execute(&pool).await.unwrap();
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        assert_eq!(store.reap().await.unwrap().len(), 1, "deadlines pass");
        assert_eq!(claim(&store, "w").await.unwrap().job.id, good.id);
        assert!(claim(&store, "w").await.is_none());
        let now = store.get("me", &damaged.id).await.unwrap().unwrap();
        assert_eq!((now.status, now.error_code.as_deref()), (Status::Failed, Some("internal")));
        assert!(now.completed_at.is_some() && now.error.unwrap().contains("cannot be read"));
        // It is listed, told of, and old one day.
        let listed = store.list("me", EVER, None, 9).await.unwrap();
        assert_eq!(listed.iter().map(|job| &job.id).collect::<Vec<_>>(), [&good.id, &late.id, &damaged.id]);
        let due = all_due(&store, 9).await;
        assert_eq!(
            due.iter().map(|(delivery, job)| (delivery.event, &job.id)).collect::<Vec<_>>(),
            [(Event::Completed, &damaged.id)]
        );
        store.delivered(&due[0].0).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        assert_eq!(store.old(std::time::Duration::ZERO).await.unwrap().len(), 2);
        // When nothing else waits, what failed stays so.
        let (last, _) = store.submit(&new("me", "")).await.unwrap();
        sqlx::query("UPDATE jobs SET request = '' WHERE id = $1").bind(last.id.as_str()).execute(&pool).await.unwrap();
        assert!(claim(&store, "w").await.is_none());
        assert_eq!(store.get("me", &last.id).await.unwrap().unwrap().status, Status::Failed);
    });
}

#[test]
fn files_that_come_at_once_take_no_more_room_than_they_may() {
    let limits = || Limits { files_of_tenant: 7, ..Limits::default() };
    on_both(limits, |store, _| async move {
        let (ids, file) = ([(); 12].map(|()| JobId::new()), file("me", 60_000));
        let answers = join_all(ids.iter().map(|id| store.add_upload(id, &file))).await;
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 2, "{answers:?}");
        assert!(answers.iter().all(|answer| matches!(answer, Ok(_) | Err(Error::FilesFull(7)))), "{answers:?}");
    });
}

#[test]
fn models_of_a_tenant_are_few_and_come_in_pages() {
    on_both(Limits::default, |store, address| async move {
        let pool = sqlx::AnyPool::connect(&address).await.unwrap();
        sqlx::query(MODELS).execute(&pool).await.unwrap();
        let model = |name: &str| OwnModel {
            owner: "me".into(),
            name: name.into(),
            visibility: "private".into(),
            description: "d".into(),
        };
        assert!(store.add_model("local", &model("last")).await.unwrap());
        assert!(!store.add_model("local", &model("last")).await.unwrap(), "there already");
        let refused = store.add_model("local", &model("more")).await;
        assert!(matches!(refused, Err(Error::ModelsFull(1000))), "{refused:?}");
        assert!(store.add_model("you", &model("more")).await.unwrap());
        let (mut seen, mut after) = (BTreeSet::new(), (String::new(), String::new()));
        loop {
            let page = store.models("local", (after.0.as_str(), after.1.as_str()), 300).await.unwrap();
            let Some(last) = page.last() else { break };
            after = (last.owner.clone(), last.name.clone());
            assert!(page.len() <= 300 && page.iter().all(|model| seen.insert(model.name.clone())));
        }
        assert_eq!(seen.len(), 1000);
        assert_eq!(store.model("local", "me", "last").await.unwrap(), Some(model("last")));
        assert_eq!(store.model("you", "me", "last").await.unwrap(), None);
        assert!(store.remove_model("local", "me", "last").await.unwrap());
        assert!(store.add_model("local", &model("more")).await.unwrap());
    });
}

/// 999 of the tenant without keys.
pub(crate) const MODELS: &str = "WITH RECURSIVE numbers(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM numbers WHERE i < 999) \
    INSERT INTO models (tenant, owner, name, visibility, description, created_at) \
    SELECT 'local', 'me', 'model-' || CAST(i AS TEXT), 'private', '', 1 FROM numbers";
