//! Telling webhooks, from the outbox: signed, guarded, again after failures.

use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::Sha256;
use tokio::sync::watch;
use tokio::time::timeout;

use super::outputs::now;
use super::places::Places;
use super::wait::ANSWER;
use super::{Server, cog, replicate};
use crate::failpoint::failpoint;
use crate::jobs::{Delivery, Event, Job};

/// How often the outbox is looked at, if nothing ended in between.
const LOOK: Duration = Duration::from_millis(250);

/// Deliveries at a time; a slow receiver takes one of them.
const AT_ONCE: i64 = 32;

/// And of one tenant, so that its silent receivers do not take all places.
const OF_TENANT: i64 = 4;

/// Before each further attempt to tell of an end: some seconds at first, three days in all. Other events are told once.
const PAUSES: [Duration; 9] = [
    Duration::from_secs(5),
    Duration::from_secs(60),
    Duration::from_secs(5 * 60),
    Duration::from_secs(30 * 60),
    Duration::from_secs(2 * 3600),
    Duration::from_secs(5 * 3600),
    Duration::from_secs(10 * 3600),
    Duration::from_secs(24 * 3600),
    Duration::from_secs(31 * 3600),
];

/// Before a delivery that could not be made up is begun again.
const SOON: Duration = Duration::from_secs(1);

/// A receiver may ask for a longer pause, but not for more than this.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl Server {
    /// Empties the outbox until `ended`. What is not told by then is told by whoever starts next.
    pub(super) async fn deliver(self: Arc<Self>, ended: watch::Receiver<bool>) {
        let places = Places::default();
        while !*ended.borrow() {
            let telling = places.counts();
            let free = AT_ONCE - telling.values().sum::<i64>();
            let due = if free > 0 { self.store.due(free, OF_TENANT, &telling).await } else { Ok(Vec::new()) };
            match due {
                Ok(due) => {
                    for (delivery, job) in due {
                        // The store has seen to how many they are.
                        let (server, place) = (self.clone(), places.take(job.tenant.clone(), i64::MAX));
                        tokio::spawn(async move {
                            server.tell(&delivery, &job).await;
                            drop(place);
                            // Its tenant may have more.
                            server.ended.notify_one();
                        });
                    }
                }
                Err(error) => tracing::error!(%error, "the outbox cannot be read"),
            }
            let _ = timeout(LOOK, self.ended.notified()).await;
        }
    }

    async fn tell(&self, delivery: &Delivery, job: &Job) {
        failpoint("telling");
        let sent = self.send(delivery, job).await;
        failpoint("told");
        let pause = match sent {
            Sent::Again(asked) if delivery.event == Event::Completed => pause(delivery.attempts, asked),
            // Whoever missed a start or a log line sees the end.
            Sent::Told | Sent::Again(_) | Sent::Unready => None,
        };
        let kept = match (sent, pause) {
            // If this fails as well it is due again once its minute is over.
            (Sent::Unready, _) => self.store.put_off(delivery, SOON).await,
            (_, Some(pause)) => self.store.undelivered(delivery, pause).await,
            (_, None) => self.store.delivered(delivery).await,
        };
        if let Err(error) = kept {
            tracing::error!(job = %job.id, %error, "the outbox cannot be written");
        }
    }

    async fn send(&self, delivery: &Delivery, job: &Job) -> Sent {
        let Some(webhook) = &job.webhook else { return Sent::Told };
        let base = job.request["address"].as_str().unwrap_or_default();
        // Links, never the pictures themselves: receivers refuse large bodies.
        let Ok(mut prediction) = replicate::prediction(self, base, job, true).await else { return Sent::Unready };
        // Cog's clients know their predictions by the names that they gave them.
        match timeout(ANSWER, cog::name(self, job)).await {
            Ok(Ok(Some(name))) => prediction["id"] = json!(name),
            Ok(Ok(None)) => {}
            Ok(Err(_)) | Err(_) => return Sent::Unready,
        }
        let body = prediction.to_string();
        let id = name(delivery);
        let time = now().to_string();
        let headers = [
            ("content-type", "application/json"),
            ("webhook-id", &id),
            ("webhook-timestamp", &time),
            ("webhook-signature", &self.signature(&job.tenant, &id, &time, &body)),
        ];
        let headers: HeaderMap = headers
            .into_iter()
            .filter_map(|(name, value)| Some((HeaderName::from_static(name), HeaderValue::from_str(value).ok()?)))
            .collect();
        let event = delivery.event.as_str();
        match self.web.post(&webhook.url, headers, body.into_bytes()).await {
            Ok((200..=299, _)) => Sent::Told,
            // Gone: it does not want to hear any more.
            Ok((410, _)) => Sent::Told,
            Ok((status, after)) => {
                tracing::warn!(job = %job.id, event, status, attempt = delivery.attempts, "a webhook refused");
                Sent::Again(after)
            }
            Err(error) => {
                tracing::warn!(job = %job.id, event, %error, attempt = delivery.attempts, "a webhook was not reached");
                Sent::Again(None)
            }
        }
    }

    /// As Standard Webhooks: HMAC-SHA256 of `id.timestamp.body`.
    fn signature(&self, tenant: &str, id: &str, time: &str, body: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret.webhook_key(tenant)).expect("any length is a key");
        mac.update(format!("{id}.{time}.{body}").as_bytes());
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }

    /// What a tenant checks signatures with.
    pub(super) fn webhook_secret(&self, tenant: &str) -> String {
        format!("whsec_{}", STANDARD.encode(self.secret.webhook_key(tenant)))
    }
}

/// The same for every attempt, so that receivers can tell repetitions. Logs are told more than once, each time with more lines.
fn name(Delivery { job, event, logged, .. }: &Delivery) -> String {
    match event {
        Event::Logs => format!("msg_{job}_logs_{logged}"),
        event => format!("msg_{job}_{}", event.as_str()),
    }
}

/// Before the attempt after this many failures; `None` once there were enough.
fn pause(failures: i64, asked: Option<Duration>) -> Option<Duration> {
    let own = *PAUSES.get(usize::try_from(failures).ok()?)?;
    Some(asked.map_or(own, |asked| asked.min(LONGEST).max(own)))
}

enum Sent {
    Told,
    /// Not now; perhaps after a pause that the receiver asked for.
    Again(Option<Duration>),
    /// Nobody was asked: what to say could not be made up, as our own database failed.
    Unready,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Instant;

    use sqlx::Executor;

    use super::*;
    use crate::api::Keep;
    use crate::blobs::Blobs;
    use crate::jobs::{JobId, NewJob, Outcome, Webhook};

    #[tokio::test]
    async fn a_database_that_fails_costs_no_attempt() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(folder.path().join("files").to_str().unwrap(), &[]).unwrap();
        let server = Server::for_tests(folder.path(), blobs, Keep::default()).await;
        let webhook = Webhook { url: "http://127.0.0.1:1/".into(), events: vec![Event::Start, Event::Completed] };
        server.store.submit(&NewJob { webhook: Some(webhook), ..NewJob::for_tests() }).await.unwrap();
        let claim = server.store.claim("w", "", &[], &[], Duration::from_secs(60)).await.unwrap().unwrap();
        server.store.finish(&claim, &Outcome::Canceled).await.unwrap();
        let begun = Instant::now();
        let due = async |many: usize| {
            let mut due = Vec::new();
            while due.len() < many {
                assert!(begun.elapsed() < Duration::from_secs(20), "{due:?}");
                due.extend(server.store.due(9, 9, &BTreeMap::new()).await.unwrap());
                tokio::time::sleep(LOOK).await;
            }
            due
        };
        let first = due(2).await;
        let database = sqlx::AnyPool::connect(&format!("sqlite:{}", folder.path().join("jobs.db").display())).await.unwrap();
        database.execute("ALTER TABLE idempotency RENAME TO idempotency_away").await.unwrap();
        for (delivery, job) in &first {
            server.tell(delivery, job).await;
        }
        database.execute("ALTER TABLE idempotency_away RENAME TO idempotency").await.unwrap();
        let again = due(2).await;
        assert!(first.iter().all(|(delivery, _)| again.iter().any(|(other, _)| other == delivery)), "{again:?}");
        // A receiver that fails is another thing.
        for (delivery, job) in &again {
            server.tell(delivery, job).await;
        }
        assert_eq!(server.store.waiting().await.unwrap().untold, 1, "a start is told once, an end again");
    }

    #[test]
    fn repetitions_have_one_name_and_later_lines_another() {
        let job = JobId::new();
        let named = |event, attempts, logged| name(&Delivery { job: job.clone(), event, attempts, logged });
        assert_eq!(named(Event::Completed, 0, 7), format!("msg_{job}_completed"));
        assert_eq!(named(Event::Completed, 3, 9), named(Event::Completed, 0, 7));
        assert!(named(Event::Logs, 1, 7) == named(Event::Logs, 0, 7) && named(Event::Logs, 0, 7) != named(Event::Logs, 0, 9));
    }

    #[test]
    fn attempts_come_ever_later_and_end() {
        let day = Duration::from_secs(24 * 3600);
        let all: Vec<_> = (0..20).map_while(|failures| pause(failures, None)).collect();
        assert!(all.len() == PAUSES.len() && all.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(all.iter().sum::<Duration>() > 3 * day, "three days in all");
        // A receiver may ask for more, for no more than a day, and never for less.
        assert_eq!(pause(0, Some(Duration::from_secs(100))), Some(Duration::from_secs(100)));
        assert_eq!((pause(0, Some(100 * day)), pause(4, Some(Duration::ZERO))), (Some(day), pause(4, None)));
        assert_eq!(pause(8, Some(day)), pause(8, None));
    }
}
