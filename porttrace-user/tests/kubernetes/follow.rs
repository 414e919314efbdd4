//! The local copy that follows the API.

use super::server::{Reply, Request, Server};
use super::{NODES, PODS, SERVICES, SLICES, cluster, failure, node, options, recorded};
use porttrace_user::collect::kubernetes::Watch;
use porttrace_user::core::model::cluster::{Cluster, Part};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

/// How long a change may take to arrive, kube's pauses after failures included, on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// The recorded cluster with watches whose events a test sends.
#[derive(Clone, Default)]
struct Feed {
    lines: Arc<Mutex<BTreeMap<String, Vec<UnboundedSender<String>>>>>,
    /// Answers that come before the usual ones, by path.
    instead: Arc<Mutex<BTreeMap<String, Vec<Value>>>>,
}

impl Feed {
    fn answer(&self, request: &Request) -> Reply {
        let lists = [SERVICES, SLICES, PODS, NODES];
        if request.is_watch() {
            return Reply::Lines(self.watch(&request.path));
        }
        if request.path == NODES {
            let mut list = recorded("nodes.json");
            list["items"] = json!([node("worker3")]);
            return Reply::Json(200, list);
        }
        let instead = self.instead.lock().unwrap().get_mut(&request.path).and_then(Vec::pop);
        match instead {
            Some(list) if lists.contains(&request.path.as_str()) => Reply::Json(200, list),
            _ => cluster(request),
        }
    }

    fn watch(&self, path: &str) -> UnboundedReceiver<String> {
        let (sender, receiver) = unbounded_channel();
        self.lines.lock().unwrap().entry(path.to_owned()).or_default().push(sender);
        receiver
    }

    /// Sends an event to the newest watch of a path, once there is one.
    async fn send(&self, path: &str, event: Value) {
        self.when(path, 1).await;
        let lines = self.lines.lock().unwrap();
        lines[path].last().unwrap().send(event.to_string()).unwrap();
    }

    /// Waits until a path was watched this often.
    async fn when(&self, path: &str, times: usize) {
        let count = || self.lines.lock().unwrap().get(path).map_or(0, Vec::len);
        let wait = async {
            while count() < times {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{path} is watched {} times, not {times}", count()));
    }
}

async fn until(watch: &Watch, what: &str, mut holds: impl FnMut(&Cluster) -> bool) -> Cluster {
    let wait = async {
        let mut seen = u64::MAX;
        loop {
            let changes = watch.changes();
            if changes != seen {
                seen = changes;
                let cluster = watch.cluster();
                if holds(&cluster) {
                    return cluster;
                }
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, wait).await.unwrap_or_else(|_| panic!("never {what}: {:?}", watch.cluster()))
}

fn service(name: &str, port: u16) -> Value {
    json!({
        "kind": "Service", "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "default", "uid": name, "resourceVersion": "3000"},
        "spec": {"clusterIP": "10.96.9.9", "ports": [{"port": port, "targetPort": port}]},
    })
}

fn ports(cluster: &Cluster, name: &str) -> Vec<u16> {
    let found = cluster.services.iter().find(|service| service.name.name == name);
    found.into_iter().flat_map(|service| &service.ports).map(|port| port.port).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_arrive_and_a_forgotten_place_is_listed_again() {
    let feed = Feed::default();
    let server = Server::start({
        let feed = feed.clone();
        move |request| feed.answer(request)
    });
    let watch = Watch::start(options(server.kubeconfig())).await.unwrap();
    let cluster = until(&watch, "whole", |cluster| {
        cluster.services.iter().count() == 50
            && cluster.slices.iter().count() == 51
            && cluster.pods.iter().count() == 10
            && cluster.nodes.iter().count() == 1
    })
    .await;
    assert_eq!(cluster.pods_of.as_deref(), Some("worker3"));
    assert!(
        server
            .seen()
            .iter()
            .filter(|one| one.path == PODS)
            .all(|one| { one.parameter("fieldSelector") == Some("spec.nodeName=worker3") })
    );

    feed.send(SERVICES, json!({"type": "ADDED", "object": service("new", 80)})).await;
    until(&watch, "added", |cluster| ports(cluster, "new") == [80]).await;
    feed.send(SERVICES, json!({"type": "MODIFIED", "object": service("new", 81)})).await;
    until(&watch, "changed", |cluster| ports(cluster, "new") == [81]).await;
    feed.send(SERVICES, json!({"type": "DELETED", "object": service("new", 81)})).await;
    let cluster = until(&watch, "deleted", |cluster| ports(cluster, "new").is_empty()).await;
    assert_eq!(cluster.services.iter().count(), 50);

    // 410: what was missed meanwhile is in the new list, and what is gone is not.
    let mut list = recorded("services.json");
    list["items"] = json!([service("after", 90)]);
    feed.instead.lock().unwrap().insert(SERVICES.to_owned(), vec![list]);
    let gone = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "too old resource version: 2894 (3001)", "reason": "Expired", "code": 410});
    feed.send(SERVICES, json!({"type": "ERROR", "object": gone})).await;
    let cluster = until(&watch, "listed again", |cluster| ports(cluster, "after") == [90]).await;
    assert_eq!(cluster.services.iter().count(), 1);
    assert_eq!(cluster.pods.iter().count(), 10);

    // A watch that the server ends (its timeout) is begun again, without forgetting anything.
    feed.when(SERVICES, 2).await;
    feed.lines.lock().unwrap().clear();
    feed.send(SERVICES, json!({"type": "ADDED", "object": service("later", 91)})).await;
    let cluster = until(&watch, "watched again", |cluster| ports(cluster, "later") == [91]).await;
    assert_eq!(ports(&cluster, "after"), [90]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_forbidden_says_so_until_it_is_allowed() {
    let feed = Feed::default();
    let allowed = Arc::new(Mutex::new(false));
    let server = Server::start({
        let (feed, allowed) = (feed.clone(), allowed.clone());
        move |request| match request.path.as_str() {
            SLICES if !*allowed.lock().unwrap() => failure(403, "endpointslices.discovery.k8s.io is forbidden"),
            _ => feed.answer(request),
        }
    });
    let watch = Watch::start(options(server.kubeconfig())).await.unwrap();
    let forbidden = Part::Missing("forbidden: endpointslices.discovery.k8s.io is forbidden".to_owned());
    until(&watch, "forbidden", |cluster| cluster.slices == forbidden && cluster.services.iter().count() == 50).await;
    *allowed.lock().unwrap() = true;
    until(&watch, "allowed", |cluster| cluster.slices.iter().count() == 51).await;
}

#[tokio::test]
async fn without_credentials_there_is_nothing_to_follow() {
    let error = Watch::start(options(Path::new("/nowhere/kubeconfig").to_owned())).await.unwrap_err();
    assert!(error.to_string().contains("/nowhere/kubeconfig cannot be used"), "{error}");
}
