//! What porttrace makes of the Kubernetes API, with the recorded answers of a real one and with the ways in which one fails.

mod ask;
mod follow;
mod server;

use porttrace_user::collect::kubernetes::Options;
use serde_json::{Value, json};
use server::{Reply, Request, TOKEN};
use std::path::{Path, PathBuf};

const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const PODS: &str = "/api/v1/pods";
const NODES: &str = "/api/v1/nodes";
fn recorded(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/kubernetes-api").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn node(name: &str) -> Option<Value> {
    let nodes = recorded("nodes.json");
    let mut node = nodes["items"].as_array().unwrap().iter().find(|node| node["metadata"]["name"] == name)?.clone();
    node["kind"] = json!("Node");
    Some(node)
}

fn failure(code: u16, message: &str) -> Reply {
    Reply::Json(
        code,
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "code": code}),
    )
}

/// The recorded cluster, as a server gives it that has nothing to complain of.
fn cluster(request: &Request) -> Reply {
    if request.token != TOKEN {
        return Reply::Json(401, recorded("badtoken.json"));
    }
    match request.path.as_str() {
        SERVICES => Reply::Json(200, recorded("services.json")),
        SLICES => Reply::Json(200, recorded("endpointslices.json")),
        PODS if request.parameter("fieldSelector") == Some("spec.nodeName=worker3") => {
            Reply::Json(200, recorded("pods-node.json"))
        }
        NODES => Reply::Json(200, recorded("nodes.json")),
        path => match path.strip_prefix("/api/v1/nodes/").and_then(node) {
            Some(node) => Reply::Json(200, node),
            None => Reply::Json(404, recorded("missing.json")),
        },
    }
}

fn options(kubeconfig: PathBuf) -> Options {
    Options { kubeconfig: Some(kubeconfig), node_name: Some("worker3".to_owned()), addresses: Vec::new() }
}
