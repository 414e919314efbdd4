use super::*;
use std::time::Instant as Clock;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;

/// How long reading may take when somebody hangs, on a busy machine.
const SOON: Duration = Duration::from_secs(4);

async fn why(socket: &Path) -> String {
    match read(Some(socket)).await {
        Part::Missing(why) => why,
        Part::Known(sandboxes) => panic!("nobody could have said {sandboxes:?}"),
    }
}

#[tokio::test]
async fn a_runtime_that_hangs_costs_little_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hung.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let start = Clock::now();
    let why = why(&path).await;
    assert!(why.contains(path.to_str().unwrap()) && why.contains("did not answer Version in time"), "{why}");
    assert!(start.elapsed() >= PATIENCE && start.elapsed() < SOON, "{:?}", start.elapsed());
    drop(listener);
}

#[tokio::test]
async fn whoever_speaks_no_grpc_or_hangs_up_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for (name, words) in [("http.sock", &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..]), ("mute.sock", b"")] {
        let path = folder.path().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                // The other side may be gone already.
                let _ = stream.write_all(words).await;
            }
        });
        let why = why(&path).await;
        assert!(why.contains(path.to_str().unwrap()), "{why}");
        assert_eq!(why.lines().count(), 1, "{why}");
        server.abort();
    }
}

#[tokio::test]
async fn sockets_that_are_not_there_are_said_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none.sock");
    assert!(why(&path).await.ends_with("none.sock: there is no such socket"), "{}", why(&path).await);
    let url = format!("unix://{}", path.display());
    assert!(why(Path::new(&url)).await.ends_with("none.sock: there is no such socket"));
    drop(UnixListener::bind(&path).unwrap());
    assert!(why(&path).await.ends_with("none.sock: nobody listens there"), "{}", why(&path).await);
}

#[test]
fn an_image_is_found_by_its_id_or_else_by_what_there_is() {
    let image = v1::ImageSpec { image: "docker.io/library/nginx:1".to_owned(), ..v1::ImageSpec::default() };
    let mut container = v1::Container { image: Some(image), ..v1::Container::default() };
    assert_eq!(image_id(&container), "docker.io/library/nginx:1");
    container.image_ref = "sha256:aa".to_owned();
    assert_eq!(image_id(&container), "sha256:aa");
    container.image_id = "bb".to_owned();
    assert_eq!(image_id(&container), "bb");
}

#[test]
fn an_image_is_called_by_its_name_where_only_its_id_was_asked_for() {
    let id = "4f2a".repeat(16);
    let images = |name: Option<&str>| {
        BTreeMap::from([(id.clone(), Image { name: name.map(str::to_owned), exposed: Some(Vec::new()) })])
    };
    let called = |asked: &str, written: &str, images: &BTreeMap<String, Image>| {
        let image = v1::ImageSpec {
            image: asked.to_owned(),
            user_specified_image: written.to_owned(),
            ..v1::ImageSpec::default()
        };
        container(&v1::Container { image: Some(image), image_id: id.clone(), ..v1::Container::default() }, images).image
    };
    let tagged = images(Some("quay.io/local/web:1"));
    for asked in [id.clone(), format!("sha256:{id}")] {
        assert_eq!(called(&asked, "", &tagged), "quay.io/local/web:1");
        assert_eq!(called(&asked, "web:1", &tagged), "web:1");
        assert_eq!(called(&asked, "", &images(None)), asked);
        assert_eq!(called(&asked, "", &BTreeMap::new()), asked);
    }
    assert_eq!(called("web:1", "", &tagged), "web:1");
}

#[tokio::test]
async fn usual_sockets_are_found_a_distribution_s_own_first() {
    let root = tempfile::tempdir().unwrap();
    let place = |path: &str| root.path().join(path.trim_start_matches('/'));
    let bound = |path: &str| {
        fs::create_dir_all(place(path).parent().unwrap()).unwrap();
        UnixListener::bind(place(path)).unwrap()
    };
    let found = || usual(|path| Some(place(path)));
    assert!(found().is_empty());
    let _docker = bound("/run/containerd/containerd.sock");
    let _k3s = bound("/run/k3s/containerd/containerd.sock");
    // What is no socket is none.
    fs::create_dir_all(place("/run/crio")).unwrap();
    fs::write(place("/run/crio/crio.sock"), "").unwrap();
    assert_eq!(found(), [place("/run/k3s/containerd/containerd.sock"), place("/run/containerd/containerd.sock")]);
    fs::remove_file(place("/run/crio/crio.sock")).unwrap();
    let _crio = bound("/run/crio/crio.sock");
    assert_eq!(found()[1], place("/run/crio/crio.sock"));
}
