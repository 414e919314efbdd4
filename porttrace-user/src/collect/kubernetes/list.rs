//! Everything asked once: lists in pages, this node found among the Nodes.

use super::access::{Api, ApiError};
use super::{ALL, Answer, Options};
use crate::core::model::cluster::{Cluster, Part};
use crate::core::parse::notes::Notes;
use crate::core::parse::objects::Objects;
use kube::api::{GetParams, ListParams};
use kube::core::Request;
use serde_json::Value;
use std::env;
use std::net::IpAddr;

pub(super) const SERVICES: &str = "/api/v1/services";
pub(super) const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub(super) const PODS: &str = "/api/v1/pods";
pub(super) const NODES: &str = "/api/v1/nodes";

/// Objects in one answer, as kubectl asks for them.
const PAGE: u32 = 500;
/// Pages taken at most: far more objects than the largest cluster has.
const PAGES: usize = 2_000;

/// The whole answer within [`ALL`].
pub(super) async fn all(api: &Api, options: &Options) -> Answer {
    match tokio::time::timeout(ALL, ask(api, options)).await {
        Ok(answer) => answer,
        Err(_) => Answer { cluster: Part::Missing(api.silent().to_string()), remarks: Vec::new() },
    }
}

async fn ask(api: &Api, options: &Options) -> Answer {
    let of_node = async {
        let node = this_node(api, options).await;
        let pods = match &node {
            Ok((name, _)) => list(api, PODS, Some(&of_node(name))).await,
            Err(error) => Err(error.clone()),
        };
        (node, pods)
    };
    let (services, slices, (node, pods)) = tokio::join!(list(api, SERVICES, None), list(api, SLICES, None), of_node);
    let name = node.as_ref().ok().map(|(name, _)| name.clone());
    let node = node.and_then(|(_, node)| node).map(|node| vec![node]);
    let mut notes = Notes::new("kubernetes");
    let cluster = Cluster {
        services: part(&services, &mut notes, |cluster| cluster.services),
        slices: part(&slices, &mut notes, |cluster| cluster.slices),
        pods: part(&pods, &mut notes, |cluster| cluster.pods),
        nodes: part(&node, &mut notes, |cluster| cluster.nodes),
        pods_of: name,
    };
    let remarks = notes.finish().into_iter().map(|note| note.message).collect();
    Answer { cluster: Part::Known(cluster), remarks }
}

/// The selector of one node's pods.
pub(super) fn of_node(name: &str) -> String {
    format!("spec.nodeName={name}")
}

/// What the answers say, as far as `pick` takes it.
fn part<T>(
    answers: &Result<Vec<Value>, ApiError>,
    notes: &mut Notes,
    pick: impl Fn(Cluster) -> Part<Vec<T>>,
) -> Part<Vec<T>> {
    match answers {
        Err(error) => Part::Missing(error.to_string()),
        Ok(answers) => {
            let mut objects = Objects::default();
            answers.iter().for_each(|answer| objects.add(answer, notes));
            pick(objects.cluster("the API server answered with something else"))
        }
    }
}

/// All pages of a list. A list that expires between two pages (410) is begun again, once.
async fn list(api: &Api, path: &str, fields: Option<&str>) -> Result<Vec<Value>, ApiError> {
    match pages(api, path, fields).await {
        Err(ApiError::Refused { code: 410, .. }) => pages(api, path, fields).await,
        other => other,
    }
}

async fn pages(api: &Api, path: &str, fields: Option<&str>) -> Result<Vec<Value>, ApiError> {
    let mut params = ListParams::default().limit(PAGE);
    params.field_selector = fields.map(str::to_owned);
    let mut pages = Vec::new();
    while pages.len() < PAGES {
        let request = Request::new(path).list(&params).map_err(|error| api.nonsense(&error.to_string()))?;
        let mut page = json(api, &api.text(request).await?)?;
        // Taken out, because with the next page at hand this one is no part of something missing.
        let token = page.get_mut("metadata").and_then(|metadata| metadata.as_object_mut()?.remove("continue"));
        pages.push(page);
        match token.as_ref().and_then(Value::as_str) {
            Some(token) if !token.is_empty() => params.continue_token = Some(token.to_owned()),
            _ => return Ok(pages),
        }
    }
    Err(api.nonsense("the list never ends"))
}

async fn get(api: &Api, name: &str) -> Result<Value, ApiError> {
    let request = Request::new(NODES).get(name, &GetParams::default());
    json(api, &api.text(request.map_err(|error| api.nonsense(&error.to_string()))?).await?)
}

fn json(api: &Api, text: &str) -> Result<Value, ApiError> {
    serde_json::from_str(text).map_err(|error| api.nonsense(&error.to_string()))
}

/// A node's name, and its object or why that is not to be had.
type Named = (String, Result<Value, ApiError>);

/// This node: by the name that we were given, else by the host's name, else by an address.
pub(super) async fn this_node(api: &Api, options: &Options) -> Result<Named, ApiError> {
    let given = options.node_name.clone().or_else(|| env::var("NODE_NAME").ok()).filter(|name| !name.is_empty());
    if let Some(name) = given {
        return match get(api, &name).await {
            Err(ApiError::Refused { code: 404, .. }) => {
                Err(ApiError::Node(format!("the cluster has no node {name:?}; name this one with --node-name")))
            }
            Err(error @ ApiError::Forbidden { .. }) => Ok((name, Err(error))),
            Err(error) => Err(error),
            Ok(node) => Ok((name, Ok(node))),
        };
    }
    let names = nix::sys::utsname::uname().ok();
    let host = names.as_ref().and_then(|names| names.nodename().to_str()).unwrap_or_default();
    // The kubelet writes it in small letters (pkg/util/node/node.go, `GetHostname`).
    let host = host.trim().to_lowercase();
    match get(api, &host).await {
        Ok(node) if has_address(&node, &options.addresses) => Ok((host, Ok(node))),
        Ok(_) | Err(ApiError::Refused { code: 404, .. }) => by_address(api, options, &host).await,
        Err(error @ ApiError::Forbidden { .. }) => Ok((host, Err(error))),
        Err(error) => Err(error),
    }
}

async fn by_address(api: &Api, options: &Options, host: &str) -> Result<Named, ApiError> {
    let unknown = |why: &str| {
        ApiError::Node(format!("which of the cluster's nodes this is is not known: {why}; say it with --node-name"))
    };
    let lists = match list(api, NODES, None).await {
        Err(ApiError::Forbidden { .. }) => {
            return Err(unknown(&format!("none is called {host:?}, and they may not be listed")));
        }
        other => other?,
    };
    let items = lists.into_iter().filter_map(|mut list| list.get_mut("items").map(Value::take));
    let nodes = items.filter_map(|items| if let Value::Array(items) = items { Some(items) } else { None }).flatten();
    for mut node in nodes {
        let name = node.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
        if let Some(name) = name.filter(|_| !options.addresses.is_empty() && has_address(&node, &options.addresses)) {
            // Items of a list do not name their kind.
            node["kind"] = "Node".into();
            return Ok((name, Ok(node)));
        }
    }
    Err(unknown(&format!("none is called {host:?} or has one of our addresses")))
}

/// Whether one of the node's addresses is ours; taken for true where either side has none.
fn has_address(node: &Value, own: &[IpAddr]) -> bool {
    let listed = node.pointer("/status/addresses").and_then(Value::as_array).into_iter().flatten();
    let listed: Vec<IpAddr> = listed.filter_map(|one| one.get("address")?.as_str()?.parse().ok()).collect();
    own.is_empty() || listed.is_empty() || listed.iter().any(|address| own.contains(address))
}
