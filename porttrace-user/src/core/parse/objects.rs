//! Kubernetes objects as `kubectl get … -o json|yaml` and the API print them: a list, one object, several YAML documents.
//! Only the fields that decide where a packet goes are taken; kinds that decide nothing are passed over.

use super::notes::{Notes, quote};
use crate::core::model::cluster::{Cluster, EndpointSlice, Node, ObjectName, Part, Pod, Service};
use serde_json::Value;
use std::collections::BTreeMap;

mod wire;

/// Objects found so far, by kind and name; a later one of the same name replaces an earlier one.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    services: Option<BTreeMap<ObjectName, Service>>,
    slices: Option<BTreeMap<ObjectName, EndpointSlice>>,
    pods: Option<BTreeMap<ObjectName, Pod>>,
    nodes: Option<BTreeMap<String, Node>>,
}

impl Objects {
    /// Reads one text, JSON or YAML.
    pub fn read(&mut self, text: &str, notes: &mut Notes) {
        match documents(text) {
            Ok(documents) => documents.iter().for_each(|document| self.add(document, notes)),
            Err(why) => notes.add(0, format!("not understood, so that none of its objects are known: {why}")),
        }
    }

    /// Adds an object, or the items of a list, as the API gives them (items of a `PodList` do not name their kind).
    pub fn add(&mut self, value: &Value, notes: &mut Notes) {
        let kind = value.get("kind").and_then(Value::as_str).unwrap_or_default();
        let Some(items) = value.get("items").and_then(Value::as_array) else {
            return self.one(kind, value, notes);
        };
        let of = kind.strip_suffix("List").unwrap_or_default();
        // An empty list says that there is none, which is not the same as not having asked.
        self.seen(of);
        for item in items {
            let kind = item.get("kind").and_then(Value::as_str).unwrap_or(of);
            self.one(kind, item, notes);
        }
        let more = value.pointer("/metadata/continue").and_then(Value::as_str).is_some_and(|text| !text.is_empty());
        if more {
            notes.add(0, format!("this {kind} is one page of several: objects are missing"));
        }
    }

    fn seen(&mut self, kind: &str) {
        match kind {
            "Service" => drop(self.services.get_or_insert_default()),
            "EndpointSlice" => drop(self.slices.get_or_insert_default()),
            "Pod" => drop(self.pods.get_or_insert_default()),
            "Node" => drop(self.nodes.get_or_insert_default()),
            _ => {}
        }
    }

    fn one(&mut self, kind: &str, value: &Value, notes: &mut Notes) {
        let done = match kind {
            "Service" => wire::service(value).map(|one| keep(&mut self.services, one.name.clone(), one)),
            "EndpointSlice" => wire::slice(value).map(|one| {
                // Endpoints that are names (FQDN) decide nothing on a node.
                if let Some(one) = one {
                    keep(&mut self.slices, one.name.clone(), one);
                }
            }),
            "Pod" => wire::pod(value).map(|one| keep(&mut self.pods, one.name.clone(), one)),
            "Node" => wire::node(value).map(|one| keep(&mut self.nodes, one.name.clone(), one)),
            "" => Err("has no kind: it is no Kubernetes object".to_owned()),
            _ => Ok(()),
        };
        if let Err(why) = done {
            let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("without a name");
            notes.add(0, format!("{} {}: {why}; left out", quote(kind), quote(name)));
        }
    }

    /// What was found; kinds that were in none of the texts are missing because of `why`.
    pub fn cluster(self, why: &str) -> Cluster {
        Cluster {
            services: part(self.services, "Services", why),
            slices: part(self.slices, "EndpointSlices", why),
            pods: part(self.pods, "Pods", why),
            nodes: part(self.nodes, "Nodes", why),
            pods_of: None,
        }
    }
}

fn keep<K: Ord, T>(all: &mut Option<BTreeMap<K, T>>, name: K, one: T) {
    all.get_or_insert_default().insert(name, one);
}

fn part<K, T>(all: Option<BTreeMap<K, T>>, kind: &str, why: &str) -> Part<Vec<T>> {
    match all {
        Some(all) => Part::Known(all.into_values().collect()),
        None => Part::Missing(format!("{kind} are not known: {why}")),
    }
}

/// The documents of a text, JSON or YAML.
///
/// # Errors
/// One sentence when it is neither.
pub(super) fn documents(text: &str) -> Result<Vec<Value>, String> {
    let start = text.trim_start();
    if start.starts_with('{') {
        json(text)
    } else if start.is_empty() {
        Err("is empty".to_owned())
    } else {
        yaml(text)
    }
}

/// One value after another, as `kubectl` and `jq` print several.
fn json(text: &str) -> Result<Vec<Value>, String> {
    serde_json::Deserializer::from_str(text).into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())
}

fn yaml(text: &str) -> Result<Vec<Value>, String> {
    // The text is bounded by whoever read it; a node count that fits a large cluster is no bomb (aliases stay bounded).
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
            max_documents: usize::MAX,
        },
        strict_booleans: true,
        with_snippet: false,
    };
    let documents: Vec<Option<Value>> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| error.to_string().lines().next().unwrap_or_default().to_owned())?;
    Ok(documents.into_iter().flatten().filter(|value| !value.is_null()).collect())
}

#[cfg(test)]
#[path = "objects/tests.rs"]
mod tests;
