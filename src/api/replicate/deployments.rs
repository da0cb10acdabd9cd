//! Deployments: each served model is one of itself, under its own name.

use std::sync::Arc;

use axum::extract::Path;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::schema::{MODELS, Served};
use super::{Answer, create};
use crate::api::Server;
use crate::api::problem::Problem;

pub(super) fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/deployments", get(list))
        .route("/deployments/{owner}/{name}", get(show))
        .route("/deployments/{owner}/{name}/predictions", post(create::by_model))
}

async fn list() -> Answer {
    let results: Vec<Value> = MODELS.iter().map(describe).collect();
    Ok(Json(json!({ "next": null, "previous": null, "results": results })).into_response())
}

async fn show(Path((owner, name)): Path<(String, String)>) -> Answer {
    let served = Served::named(&owner, &name).ok_or(Problem::NotFound)?;
    Ok(Json(describe(served)).into_response())
}

/// With a release that never changes: clients want one.
fn describe(served: &Served) -> Value {
    let Served { owner, name, .. } = served;
    json!({
        "owner": owner,
        "name": name,
        "current_release": {
            "number": 1,
            "model": format!("{owner}/{name}"),
            "version": served.version(),
            "created_at": "2025-07-31T00:00:00.000Z",
            "created_by": { "type": "organization", "username": owner, "name": owner, "avatar_url": null, "github_url": null },
            "configuration": { "hardware": "local", "min_instances": 1, "max_instances": 1 },
        },
    })
}
