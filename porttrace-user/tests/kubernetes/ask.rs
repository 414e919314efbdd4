//! Everything asked once.

use super::server::{Reply, Request, Server, TOKEN, write_kubeconfig};
use super::{PODS, SERVICES, SLICES, cluster, failure, node, options, recorded};
use porttrace_user::collect::kubernetes::{self, Options};
use porttrace_user::collect::{facts, snapshot};
use porttrace_user::core::model::cluster::{Cluster, Part};
use porttrace_user::core::parse::notes::Notes;
use porttrace_user::core::parse::objects::Objects;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long asking may take when nobody answers, on a busy machine.
const SOON: Duration = Duration::from_secs(6);

fn ask(server: &Server) -> Cluster {
    known(kubernetes::read(&options(server.kubeconfig())).cluster)
}

fn known(cluster: Part<Cluster>) -> Cluster {
    match cluster {
        Part::Known(cluster) => cluster,
        Part::Missing(why) => panic!("{why}"),
    }
}

fn why<T: std::fmt::Debug>(part: &Part<T>) -> &str {
    part.get().err().unwrap_or_else(|| panic!("known: {part:?}"))
}

fn expected() -> Cluster {
    let mut objects = Objects::default();
    let mut notes = Notes::new("recorded");
    for name in ["services.json", "endpointslices.json", "pods-node.json"] {
        objects.add(&recorded(name), &mut notes);
    }
    objects.add(&node("worker3").unwrap(), &mut notes);
    assert_eq!(notes.finish(), []);
    Cluster { pods_of: Some("worker3".to_owned()), ..objects.cluster("") }
}

#[test]
fn a_whole_cluster_is_read_and_only_what_is_needed_is_asked() {
    let server = Server::start(cluster);
    let answer = kubernetes::read(&options(server.kubeconfig()));
    assert_eq!(answer.remarks, Vec::<String>::new());
    let found = known(answer.cluster);
    assert_eq!(found, expected());
    assert_eq!((found.services.iter().count(), found.pods.iter().count(), found.nodes.iter().count()), (50, 10, 1));
    let mut asked: Vec<String> = server.seen().iter().map(|request| request.path.clone()).collect();
    asked.sort();
    assert_eq!(asked, ["/api/v1/nodes/worker3", PODS, SERVICES, SLICES]);
}

/// Gives a recorded list in pages, as the API server does with `limit` and `continue`.
fn page(name: &str, request: &Request, size: usize) -> Value {
    let mut list = recorded(name);
    let start: usize = request.parameter("continue").map_or(0, |token| token.parse().unwrap());
    let items = list["items"].as_array().unwrap();
    let (part, more) = (items[start..items.len().min(start + size)].to_vec(), start + size < items.len());
    list["items"] = json!(part);
    if more {
        list["metadata"]["continue"] = json!((start + size).to_string());
    }
    list
}

#[test]
fn pages_are_followed_and_a_list_that_expires_is_begun_again() {
    let expired = AtomicUsize::new(0);
    let server = Server::start(move |request| match request.path.as_str() {
        SERVICES => Reply::Json(200, page("services.json", request, 7)),
        SLICES if request.parameter("continue") == Some("20") && expired.fetch_add(1, Ordering::SeqCst) == 0 => {
            failure(410, "The provided continue parameter is too old to display a consistent list result.")
        }
        SLICES => Reply::Json(200, page("endpointslices.json", request, 20)),
        _ => cluster(request),
    });
    assert_eq!(ask(&server), expected());
    let asked = |path: &str| server.seen().iter().filter(|request| request.path == path).count();
    assert_eq!((asked(SERVICES), asked(SLICES)), (8, 5));
    assert!(server.seen().iter().filter(|one| one.path == SERVICES).all(|one| one.parameter("limit") == Some("500")));

    let always = Server::start(|request| match request.path.as_str() {
        SLICES => failure(410, "too old resource version"),
        _ => cluster(request),
    });
    let found = ask(&always);
    assert!(why(&found.slices).contains("410 too old resource version"), "{}", why(&found.slices));
    assert_eq!(found.services, expected().services);
}

#[test]
fn what_is_forbidden_is_missing_alone() {
    const WORDS: &str =
        r#"endpointslices.discovery.k8s.io is forbidden: User "system:node:worker3" cannot list resource"#;
    let server = Server::start(|request| match request.path.as_str() {
        SLICES => failure(403, WORDS),
        "/api/v1/nodes/worker3" => failure(403, "nodes is forbidden"),
        _ => cluster(request),
    });
    let found = ask(&server);
    assert_eq!(why(&found.slices), format!("forbidden: {WORDS}"));
    assert_eq!(why(&found.nodes), "forbidden: nodes is forbidden");
    let expected = expected();
    assert_eq!((found.services, found.pods, found.pods_of), (expected.services, expected.pods, expected.pods_of));
}

#[test]
fn a_server_that_does_not_answer_costs_little_and_is_named() {
    let server = Server::start(|_| Reply::Silence);
    let start = Instant::now();
    let found = ask(&server);
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    for why in [why(&found.services), why(&found.slices), why(&found.pods), why(&found.nodes)] {
        assert!(
            why.starts_with("the API server at https://127.0.0.1:") && why.ends_with("did not answer in time"),
            "{why}"
        );
    }
    // One part that hangs costs that part only.
    let server = Server::start(|request| if request.path == SERVICES { Reply::Silence } else { cluster(request) });
    let found = ask(&server);
    assert!(why(&found.services).ends_with("did not answer in time"));
    assert_eq!(found.pods, expected().pods);
}

#[test]
fn hanging_up_halves_and_nonsense_are_told() {
    let server = Server::start(|request| match request.path.as_str() {
        SERVICES => Reply::Hangup,
        SLICES => Reply::Half(recorded("endpointslices.json")),
        PODS => Reply::Text("<html>\nlogin first".to_owned()),
        _ => cluster(request),
    });
    let found = ask(&server);
    assert!(why(&found.services).contains("cannot be reached"), "{}", why(&found.services));
    assert!(why(&found.slices).contains("cannot be reached"), "{}", why(&found.slices));
    assert!(why(&found.pods).contains("answered what is not understood"), "{}", why(&found.pods));
    assert_eq!(found.nodes, expected().nodes);
}

#[test]
fn credentials_and_certificates_that_are_not_good_are_told() {
    let server = Server::start(|_| Reply::Json(401, recorded("badtoken.json")));
    let found = ask(&server);
    assert!(why(&found.pods).contains("does not accept the credentials of the kubeconfig /"), "{}", why(&found.pods));
    let found = known(kubernetes::read(&options(server.kubeconfig_with_another_ca())).cluster);
    assert!(why(&found.pods).contains("certificate"), "{}", why(&found.pods));
    assert!(server.seen().iter().all(|request| request.path != "/api/v1/secrets"));
}

#[test]
fn without_a_server_or_a_kubeconfig_the_reason_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    // A port that nobody listens on: taken and given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let found = known(
        kubernetes::read(&options(write_kubeconfig(folder.path(), &format!("https://127.0.0.1:{port}"), None))).cluster,
    );
    assert!(why(&found.services).contains("cannot be reached: Connection refused"), "{}", why(&found.services));

    for (text, words) in [("clusters: [", "cannot be used"), ("{}", "cannot be used"), ("", "cannot be used")] {
        let path = folder.path().join("bad");
        std::fs::write(&path, text).unwrap();
        let answer = kubernetes::read(&options(path)).cluster;
        let why = why(&answer);
        assert!(why.contains(words) && why.lines().count() == 1, "{text:?}: {why}");
    }
    let answer = kubernetes::read(&options(folder.path().join("none"))).cluster;
    assert!(why(&answer).contains("none cannot be used"), "{}", why(&answer));
}

#[test]
fn this_node_is_found_by_address_and_a_wrong_name_is_said() {
    let server = Server::start(cluster);
    let own = |address: &str| Options {
        node_name: None,
        addresses: vec![address.parse().unwrap()],
        kubeconfig: Some(server.kubeconfig()),
    };
    assert_eq!(known(kubernetes::read(&own("172.18.0.3")).cluster), expected());
    let lost = known(kubernetes::read(&own("192.0.2.1")).cluster);
    assert!(why(&lost.pods).contains("say it with --node-name"), "{}", why(&lost.pods));
    assert_eq!(lost.services, expected().services);
    let wrong = Options { node_name: Some("worker9".to_owned()), ..own("172.18.0.3") };
    let wrong = known(kubernetes::read(&wrong).cluster);
    assert!(why(&wrong.pods).contains(r#"the cluster has no node "worker9""#), "{}", why(&wrong.pods));
}

/// Everything that an object can carry and that is nobody's business.
#[test]
fn secrets_environment_and_annotations_are_not_in_a_snapshot() {
    let secret = |kind: &str, spec: Value| {
        json!({"kind": format!("{kind}List"), "metadata": {}, "items": [{
            "metadata": {
                "name": "one", "namespace": "default", "uid": "u", "labels": {"app": "web"},
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "SECRET-annotation"},
                "managedFields": [{"manager": "SECRET-manager"}],
            },
            "spec": spec, "addressType": "IPv4", "endpoints": [{"addresses": ["10.244.1.9"], "hostname": "SECRET-hostname"}],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
            "status": {"message": "SECRET-status"},
        }]})
    };
    let server = Server::start(move |request| match request.path.as_str() {
        SERVICES => Reply::Json(200, secret("Service", json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80}]}))),
        SLICES => Reply::Json(200, secret("EndpointSlice", json!({}))),
        PODS => Reply::Json(
            200,
            secret(
                "Pod",
                json!({
                    "nodeName": "worker3", "serviceAccountName": "SECRET-account",
                    "containers": [{
                        "name": "main", "image": "docker.io/local/web:1", "command": ["sh", "SECRET-command"], "args": ["SECRET-args"],
                        "env": [{"name": "PASSWORD", "value": "SECRET-env"}], "envFrom": [{"secretRef": {"name": "SECRET-ref"}}],
                        "ports": [{"containerPort": 80}],
                    }],
                    "initContainers": [{"name": "init", "image": "i", "env": [{"name": "K", "value": "SECRET-init"}]}],
                    "volumes": [{"name": "v", "secret": {"secretName": "SECRET-volume"}}],
                }),
            ),
        ),
        _ => cluster(request),
    });
    let options = facts::Options {
        kubeconfig: Some(server.kubeconfig()),
        node_name: Some("worker3".to_owned()),
        cri_socket: Some("/nowhere.sock".into()),
        ..facts::Options::default()
    };
    let collected = facts::collect(&options);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node.tar.zst");
    snapshot::write(&collected.files, &path).unwrap();
    let unpacked = zstd::decode_all(std::fs::File::open(&path).unwrap()).unwrap();
    for words in ["SECRET", TOKEN] {
        assert!(!unpacked.windows(words.len()).any(|part| part == words.as_bytes()), "{words} is in the archive");
    }
    // What is wanted is there.
    let facts = porttrace_user::core::parse::facts(&snapshot::read_files(&path).unwrap());
    assert_eq!(facts.state.name.as_deref(), Some("worker3"));
    let pod = facts.cluster.pods.iter().next().unwrap();
    assert_eq!((pod.name.to_string().as_str(), pod.containers[0].ports[0].port), ("default/one", 80));
    assert_eq!((facts.cluster.services.iter().count(), facts.cluster.slices.iter().count()), (1, 1));
    assert!(why(&facts.sandboxes).contains("/nowhere.sock"), "{:?}", facts.sandboxes);
    assert!(!server.seen().iter().any(|request| request.path.contains("secrets")));
}
