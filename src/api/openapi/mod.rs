//! The OpenAPI document of everything that is served. Models' inputs come from the table by which requests are checked.

mod routes;
mod schemas;

use serde_json::{Value, json};
use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathsBuilder};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, PathItem, Ref, RefOr, Required, ResponseBuilder,
    Schema, ServerBuilder,
};

use self::routes::{JSON, PROBLEM, QUERIES, ROUTES, Route};
use self::schemas::schemas;
use crate::api::auth::open;

pub(in crate::api) fn document() -> OpenApi {
    let mut paths = PathsBuilder::new();
    for route in ROUTES {
        paths = paths.path(route.path, PathItem::new(route.method.clone(), operation(route)));
    }
    let mut components = ComponentsBuilder::new().security_scheme(
        "key",
        SecurityScheme::Http(
            HttpBuilder::new()
                .scheme(HttpAuthScheme::Bearer)
                .description(Some("A key of `darkroom keys create`. While there are none, none is asked for."))
                .build(),
        ),
    );
    for (name, schema) in schemas() {
        components = components.schema(name, read(schema));
    }
    OpenApiBuilder::new()
        .info(
            InfoBuilder::new()
                .title("darkroom")
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some(
                    "Pictures from prompts and LoRAs with FLUX.1, for clients of Replicate, OpenAI and Cog. What is under /v1 is under / and \
                     /v1/v1 as well.",
                ))
                .build(),
        )
        .servers(Some([ServerBuilder::new().url("/").build()]))
        .paths(paths.build())
        .components(Some(components.build()))
        .build()
}

fn operation(route: &Route) -> utoipa::openapi::path::Operation {
    let mut operation = OperationBuilder::new().tag(route.dialect).summary(Some(route.about));
    let method = match &route.method {
        HttpMethod::Get => "get",
        HttpMethod::Put => "put",
        HttpMethod::Delete => "delete",
        _ => "post",
    };
    let named = format!("{method} {}", route.path);
    operation = operation.operation_id(Some(named.replace(|c: char| !c.is_alphanumeric(), "_")));
    for name in route.path.split('{').skip(1).filter_map(|part| part.split('}').next()) {
        let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path).required(Required::True);
        operation = operation.parameter(parameter.schema(Some(read(json!({ "type": "string", "minLength": 1 })))));
    }
    let queries = QUERIES.iter().filter(|(path, _)| route.method == HttpMethod::Get && *path == route.path);
    for name in queries.flat_map(|(_, names)| *names) {
        let schema = match *name {
            "cursor" => json!({ "type": "string" }),
            _ => json!({ "type": "string", "format": "date-time" }),
        };
        let parameter = ParameterBuilder::new().name(*name).parameter_in(ParameterIn::Query).required(Required::False);
        operation = operation.parameter(parameter.schema(Some(read(schema))));
    }
    if let Some((kind, schema)) = route.body {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(schema))).build();
        operation =
            operation.request_body(Some(RequestBodyBuilder::new().content(kind, content).required(Some(Required::True)).build()));
    }
    let mut answers: Vec<_> = route.answers.to_vec();
    if open(route.path) {
        operation = operation.securities(Some(Vec::<SecurityRequirement>::new()));
    } else {
        operation = operation.security(SecurityRequirement::new("key", Vec::<String>::new()));
        let openai = route.path.contains("/images/");
        answers.push(if openai { ("401", JSON, "OpenAiError") } else { ("401", PROBLEM, "Problem") });
    }
    for (status, kind, schema) in answers {
        let mut response = ResponseBuilder::new().description(match status.as_bytes()[0] {
            b'2' => "done",
            _ => "not done, and why",
        });
        if !kind.is_empty() {
            let schema = if schema.is_empty() { None } else { Some(Ref::from_schema_name(schema)) };
            response = response.content(kind, ContentBuilder::new().schema(schema).build());
        }
        operation = operation.response(status, response.build());
    }
    operation.build()
}

fn read(schema: Value) -> RefOr<Schema> {
    serde_json::from_value(schema).expect("our schemas are schemas")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_document_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
        let now = serde_json::to_string_pretty(&document()).unwrap() + "\n";
        #[expect(clippy::disallowed_methods, reason = "tests may read the environment")]
        if std::env::var("UPDATE_OPENAPI").is_ok() {
            std::fs::write(path, &now).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(kept == now, "if this is meant, run the test with UPDATE_OPENAPI=1 and look at the difference");
    }
}
