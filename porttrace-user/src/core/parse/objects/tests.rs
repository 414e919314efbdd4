use super::*;
use crate::core::model::cluster::{ServiceType, TargetPort};
use std::path::Path;

fn recorded(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/recorded/iptables-nft/broken/objects");
    std::fs::read_to_string(folder.join(name)).expect("a recorded file")
}

fn cluster(texts: &[&str]) -> (Cluster, Vec<String>) {
    let mut objects = Objects::default();
    let mut notes = Notes::new("objects");
    texts.iter().for_each(|text| objects.read(text, &mut notes));
    let notes = notes.finish().into_iter().map(|note| note.message).collect();
    (objects.cluster("not in the texts"), notes)
}

#[test]
fn recorded_objects_are_understood_without_a_remark() {
    let names = ["services.yaml", "endpointslices.yaml", "pods.yaml", "nodes.yaml"];
    let texts: Vec<String> = names.iter().map(|name| recorded(name)).collect();
    let (cluster, notes) = cluster(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(notes, Vec::<String>::new());
    let frontend = cluster.services.iter().find(|service| service.name.to_string() == "default/frontend");
    let frontend = frontend.expect("the Service");
    assert_eq!(frontend.kind, ServiceType::NodePort);
    assert_eq!(frontend.ports[0].target, TargetPort::Number(80));
    assert_eq!((frontend.ports[0].port, frontend.ports[0].node_port), (8088, Some(30080)));
    let pod = cluster.pods.iter().find(|pod| pod.name.name == "frontend-a").expect("the Pod");
    let port = &pod.containers[0].ports[0];
    assert_eq!((port.port, port.host_port, pod.ready), (8081, Some(9088), Some(true)));
    assert_eq!(pod.node.as_deref(), Some("worker3"));
    let slice = cluster.slices.iter().find(|slice| slice.name.name == "frontend-v4").expect("the EndpointSlice");
    assert_eq!(slice.service.as_deref(), Some("frontend"));
    assert!(slice.endpoints.iter().all(|endpoint| endpoint.ready && endpoint.pod.is_some()));
    assert_eq!(cluster.nodes.iter().map(|node| node.pod_cidrs.len()).collect::<Vec<_>>(), [2, 2, 2]);
}

#[test]
fn lists_of_the_api_and_single_objects_and_documents_are_told_apart() {
    let list = r#"{"kind":"PodList","apiVersion":"v1","metadata":{"continue":"abc"},"items":[{"metadata":{"name":"a","namespace":"n"}}]}"#;
    let documents = "---\nkind: Service\nmetadata: {name: s, namespace: n}\nspec:\n  ports:\n  - {port: 53, protocol: UDP, targetPort: dns}\n---\n---\nkind: ConfigMap\nmetadata: {name: c}\n";
    let (cluster, notes) = cluster(&[list, documents, r#"{"kind":"EndpointSliceList","items":[]}"#]);
    assert_eq!(notes, ["this PodList is one page of several: objects are missing"]);
    assert_eq!(cluster.pods.iter().map(|pod| pod.name.to_string()).collect::<Vec<_>>(), ["n/a"]);
    assert_eq!(cluster.services.iter().next().map(|s| s.ports[0].target.clone()), Some(TargetPort::Name("dns".into())));
    assert_eq!(cluster.slices, Part::Known(Vec::new()));
    assert_eq!(cluster.nodes, Part::Missing("Nodes are not known: not in the texts".to_owned()));
}

#[test]
fn what_is_no_object_is_said_and_the_rest_is_kept() {
    let text = r#"{"kind":"List","items":[
        {"kind":"Service","metadata":{"name":"bad"},"spec":{"ports":[{"port":0}]}},
        {"kind":"Service","metadata":{"name":"worse"},"spec":{"clusterIP":"here"}},
        {"kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"c","ports":[{"containerPort":99999}]}]}},
        {"metadata":{"name":"what"}},
        {"kind":"Service","metadata":{"name":"good"},"spec":{"clusterIP":"None"}}]}"#;
    let (found, notes) = cluster(&[text, "a: [", "", "just words"]);
    assert_eq!(found.services.iter().map(|service| service.name.to_string()).collect::<Vec<_>>(), ["default/good"]);
    assert_eq!(notes[0], r#""Service" "bad": 0 is no port; left out"#);
    assert_eq!(notes[1], r#""Service" "worse": "here" is no address; left out"#);
    assert_eq!(notes[2], r#""Pod" "p": 99999 is no port; left out"#);
    assert_eq!(notes[3], r#""" "what": has no kind: it is no Kubernetes object; left out"#);
    assert!(notes[4].starts_with("not understood") && notes[5].contains("is empty"), "{notes:?}");
    assert_eq!(notes.len(), 7, "{notes:?}");
}

/// Whatever stands in secrets, environment and annotations, the model has no place for it.
#[test]
fn secrets_environment_and_annotations_never_enter_the_model() {
    let text = r#"{"kind":"List","items":[
        {"kind":"Secret","metadata":{"name":"s"},"data":{"password":"SECRET-1"}},
        {"kind":"Pod","metadata":{"name":"p","annotations":{"note":"SECRET-2"}},"spec":{"containers":[
            {"name":"c","image":"i","command":["x","SECRET-3"],"env":[{"name":"K","value":"SECRET-4"}],"ports":[{"containerPort":80}]}]}},
        {"kind":"Service","metadata":{"name":"v","annotations":{"note":"SECRET-5"}},"spec":{"ports":[{"port":80}]}}]}"#;
    let (found, notes) = cluster(&[text]);
    let written = serde_json::to_string(&found).expect("JSON") + &format!("{found:?}{notes:?}");
    assert!(!written.contains("SECRET"), "{written}");
    assert_eq!((found.pods.iter().count(), found.services.iter().count()), (1, 1));
    let again: Cluster = serde_json::from_str(&serde_json::to_string(&found).expect("JSON")).expect("the same again");
    assert_eq!(again, found);
}
