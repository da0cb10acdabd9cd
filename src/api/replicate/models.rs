//! The models that are served, and names of tenants' own, which training scripts make before they train.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::headers::object;
use super::schema::{MODELS, Served};
use super::{Answer, PAGE, Page};
use crate::api::auth::Caller;
use crate::api::problem::{Body, Problem};
use crate::api::{Server, cog, openai};
use crate::jobs::OwnModel;

/// Longest description, in bytes.
const LONGEST: usize = 4096;

pub(super) fn router() -> Router<Arc<Server>> {
    Router::new()
        .route("/models", get(list).post(create))
        .route("/models/{owner}/{name}", get(show).delete(remove))
        .route("/models/{owner}/{name}/versions", get(versions))
        .route("/models/{owner}/{name}/versions/{id}", get(version))
}

/// For Replicate's clients and OpenAI's, which ask the same address. The models that are served are on the first page.
async fn list(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, page: Page) -> Answer {
    let base = server.base(&headers);
    let wrong = || Problem::invalid("invalid", "cursor", "is none that this server gave");
    let after = page.cursor.as_deref().map(|cursor| cursor.split_once('/').ok_or_else(wrong)).transpose()?;
    let mut own = server.store.models(&caller.tenant, after.unwrap_or_default(), PAGE + 1).await?;
    let more = own.len() > PAGE as usize;
    own.truncate(PAGE as usize);
    let next = own.last().filter(|_| more).map(|last| format!("{base}/v1/models?cursor={}/{}", last.owner, last.name));
    let served: &[Served] = if after.is_some() { &[] } else { MODELS };
    let mut results: Vec<Value> = served.iter().map(|served| describe(served, &base)).collect();
    results.extend(own.iter().map(|own| describe_own(own, &base)));
    let named = |served: &Served| match served.owner {
        "black-forest-labs" => served.name.to_owned(),
        owner => format!("{owner}/{}", served.name),
    };
    let data: Vec<Value> = MODELS.iter().map(|served| openai::model(&named(served), served.owner)).collect();
    Ok(Json(json!({ "next": next, "previous": null, "results": results, "object": "list", "data": data })).into_response())
}

async fn create(State(server): State<Arc<Server>>, caller: Caller, headers: HeaderMap, Body(body, _held): Body) -> Answer {
    let body = object(&headers, &body)?;
    let text = |name: &'static str| {
        let text = body.get(name).and_then(Value::as_str).unwrap_or_default().trim();
        if text.is_empty() { Err(Problem::invalid("required", "", format!("{name} is required"))) } else { Ok(text.to_owned()) }
    };
    let (owner, name, visibility) = (text("owner")?, text("name")?, text("visibility")?);
    text("hardware")?;
    for (field, text) in [("owner", &owner), ("name", &name)] {
        let plain = text.len() <= 100 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !plain {
            return Err(Problem::invalid("invalid", field, "must be at most 100 letters, digits or -_."));
        }
    }
    if !["public", "private"].contains(&visibility.as_str()) {
        return Err(Problem::invalid("enum", "visibility", "must be one of the following: \"public\", \"private\""));
    }
    let description = body.get("description").and_then(Value::as_str).unwrap_or_default();
    if description.len() > LONGEST {
        return Err(Problem::invalid("invalid", "description", format!("must be at most {LONGEST} bytes")));
    }
    let own = OwnModel { owner, name, visibility, description: description.into() };
    if Served::named(&own.owner, &own.name).is_some() || !server.store.add_model(&caller.tenant, &own).await? {
        return Err(Problem::invalid("invalid", "name", "a model of this owner and name is there already"));
    }
    Ok((StatusCode::CREATED, Json(describe_own(&own, &server.base(&headers)))).into_response())
}

async fn show(
    State(server): State<Arc<Server>>,
    caller: Caller,
    headers: HeaderMap,
    Path((owner, name)): Path<(String, String)>,
) -> Answer {
    let base = server.base(&headers);
    let described = match Served::named(&owner, &name) {
        Some(served) => describe(served, &base),
        None => describe_own(&own(&server, &caller, &owner, &name).await?, &base),
    };
    Ok(Json(described).into_response())
}

async fn remove(State(server): State<Arc<Server>>, caller: Caller, Path((owner, name)): Path<(String, String)>) -> Answer {
    let removed = server.store.remove_model(&caller.tenant, &owner, &name).await?;
    if removed { Ok(StatusCode::NO_CONTENT.into_response()) } else { Err(Problem::NotFound) }
}

async fn own(server: &Server, caller: &Caller, owner: &str, name: &str) -> Result<OwnModel, Problem> {
    server.store.model(&caller.tenant, owner, name).await?.ok_or(Problem::NotFound)
}

async fn versions(State(server): State<Arc<Server>>, caller: Caller, Path((owner, name)): Path<(String, String)>) -> Answer {
    let results: Vec<Value> = match Served::named(&owner, &name) {
        Some(served) => served.versions.iter().map(|id| describe_version(served, id)).collect(),
        None => own(&server, &caller, &owner, &name).await.map(|_| Vec::new())?,
    };
    Ok(Json(json!({ "next": null, "previous": null, "results": results })).into_response())
}

async fn version(Path((owner, name, id)): Path<(String, String, String)>) -> Result<Response, Problem> {
    let served = Served::named(&owner, &name).ok_or(Problem::NotFound)?;
    // Public code holds many hashes; all of them mean the model as it is.
    Ok(Json(describe_version(served, &id)).into_response())
}

fn describe(served: &Served, base: &str) -> Value {
    let mut model = described(served.owner, served.name, served.about, "public", base);
    model["is_official"] = json!(true);
    model["latest_version"] = describe_version(served, served.version());
    model
}

fn describe_own(own: &OwnModel, base: &str) -> Value {
    described(&own.owner, &own.name, &own.description, &own.visibility, base)
}

fn described(owner: &str, name: &str, about: &str, visibility: &str, base: &str) -> Value {
    json!({
        "url": format!("{base}/v1/models/{owner}/{name}"),
        "owner": owner,
        "name": name,
        "description": about,
        "visibility": visibility,
        "is_official": false,
        "github_url": null,
        "paper_url": null,
        "license_url": null,
        "run_count": 0,
        "cover_image_url": null,
        "default_example": null,
        "latest_version": null,
    })
}

fn describe_version(served: &Served, id: &str) -> Value {
    let schema = served.openapi();
    json!({ "id": id, "created_at": "2025-07-31T00:00:00.000Z", "cog_version": cog::VERSION, "openapi_schema": schema })
}
