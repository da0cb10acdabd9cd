//! Rows to jobs.

use serde_json::Value;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{Error, Event, Job, Webhook};

/// The columns of a job, in the order in which they are read.
pub(super) const COLUMNS: &str = "id, tenant, status, request, affinity, created_at, started_at, completed_at, deadline, epoch, progress, \
     logs, result, error_code, error, webhook, webhook_events, data_removed";

/// What is no JSON any more is missing from the job: one damaged row must not keep others from being listed, told of or ended.
pub(super) fn job(row: &AnyRow) -> Result<Job, Error> {
    let text = |column: &str| row.try_get::<String, _>(column);
    let maybe = |column: &str| row.try_get::<Option<String>, _>(column);
    let json = |text: Option<String>| text.and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let webhook = maybe("webhook")?.map(|url| -> Result<Webhook, Error> {
        let events = text("webhook_events")?;
        // One that cannot be read must not keep the others from being listed, told of or cleared away.
        Ok(Webhook { url, events: events.split_whitespace().filter_map(|event| event.parse::<Event>().ok()).collect() })
    });
    Ok(Job {
        id: text("id")?.parse().map_err(|()| Error::Damaged("id"))?,
        tenant: text("tenant")?,
        status: text("status")?.parse().map_err(|()| Error::Damaged("status"))?,
        request: json(Some(text("request")?)).unwrap_or(Value::Null),
        affinity: text("affinity")?,
        created_at: row.try_get("created_at")?,
        started_at: row.try_get("started_at")?,
        completed_at: row.try_get("completed_at")?,
        deadline: row.try_get("deadline")?,
        epoch: row.try_get("epoch")?,
        progress: json(maybe("progress")?),
        logs: text("logs")?,
        result: json(maybe("result")?),
        error_code: maybe("error_code")?,
        error: maybe("error")?,
        webhook: webhook.transpose()?,
        data_removed: row.try_get::<i64, _>("data_removed")? != 0,
    })
}
