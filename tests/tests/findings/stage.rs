//! The lab with a kube-proxy of its own, real clients, and `porttrace explain` run on worker3.

use crate::objects::Objects;
use porttrace_tests::lab::pod::PodSpec;
use porttrace_tests::lab::proxy::{Proxy, Service, recorded};
use porttrace_tests::lab::topology::NodeName;
use porttrace_tests::lab::{Lab, LabOptions, Origin};
use porttrace_tests::netns::{ChildGuard, Netns, run};
use porttrace_tests::peer::{self, Answer, Connect, Outcome, Transport};
use porttrace_tests::watch::porttrace;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// The node that is looked at.
pub const HERE: NodeName = NodeName::Worker3;
/// A client that is not answered waits so long; the lab answers within milliseconds.
const SILENCE: Duration = Duration::from_millis(400);
/// One that shall be answered, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);
/// Columns of a wide terminal: porttrace prints no longer lines but for words that cannot be broken.
const WIDTH: usize = 120;

/// Runs a command that sees the named network namespaces of one node's pods only, as it would on that node: `$1` a folder, `$2` the
/// names. Other labs that run on this machine have pods with the same addresses.
const OWN_PODS: &str = r#"
    folder=$1 names=$2; shift 2
    mount -t tmpfs none "$folder/pods"
    for name in $names; do
        : > "$folder/pods/$name"
        mount --bind "/run/netns/$name" "$folder/pods/$name"
    done
    mount --rbind "$folder/pods" /run/netns
    exec "$@"
"#;

/// A lab, and what its API server has.
pub struct Stage {
    pub lab: Lab,
    pub proxy: Proxy,
    /// Services, as kube-proxy knows them from its next [`Stage::sync`] on.
    pub services: Vec<Service>,
    folder: tempfile::TempDir,
}

impl Stage {
    pub fn up(options: LabOptions) -> Self {
        let lab = Lab::up(options).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("pods")).unwrap();
        Self { lab, proxy: Proxy::new(HERE), services: recorded(), folder }
    }

    pub fn node(&self) -> &Netns {
        self.lab.node(HERE)
    }

    /// kube-proxy of worker3 writes its rules anew.
    pub fn sync(&mut self) {
        let Self { lab, proxy, services, .. } = self;
        proxy.sync(lab.node(HERE), &lab.tools, services).unwrap();
    }

    /// The Service is there, and kube-proxy has seen it.
    pub fn serve(&mut self, service: Service) {
        self.services.retain(|other| other.name != service.name);
        self.services.push(service);
        self.sync();
    }

    /// Runs a command line on worker3, as its administrator would.
    pub fn shell(&self, line: &str) -> String {
        let mut command = self.node().command("sh");
        command.args(["-c", line]).env("PATH", self.lab.tools.path());
        run(&mut command, None).unwrap_or_else(|error| panic!("{line}: {error:#}"))
    }

    /// Runs every command line that the advice of these findings gives in backquotes.
    pub fn follow(&self, told: &Explained, id: &str) {
        let changes: Vec<&str> = told.all(id).map(|finding| finding["change"].as_str().unwrap()).collect();
        let lines: Vec<&str> = changes.iter().flat_map(|change| change.split('`').skip(1).step_by(2)).collect();
        assert!(!lines.is_empty(), "no command in {changes:?}");
        for line in lines {
            self.shell(line);
        }
    }

    /// A process of worker3 that listens there.
    pub fn process(&self, tcp: u16) -> ChildGuard {
        let mut command = self.node().command(peer::binary().unwrap());
        command.args(["serve", "--name", "process@worker3", "--tcp", &tcp.to_string()]);
        let process = ChildGuard::spawn(command).unwrap();
        let ready = process.stdout.wait_for(PATIENCE, |line| (line == "ready").then_some(()));
        assert!(ready.is_some(), "{:?}", process.stderr.snapshot());
        process
    }

    /// A pod of worker3 behind a hostPort, with a server on TCP port 80.
    pub fn web_pod(name: &'static str, number: u8, host_port: Option<u16>) -> PodSpec {
        let mappings = host_port.map(|port| mapping(port, None)).into_iter().collect();
        PodSpec { mappings, tcp: vec![80], ..PodSpec::new(name, HERE, number) }
    }

    /// Connects over TCP, and holds the outcome.
    pub fn meets(&self, origin: Origin, to: (impl Into<IpAddr>, u16), outcome: Outcome) -> Answer {
        self.sends(origin, Connect::new(Transport::Tcp, SocketAddr::new(to.0.into(), to.1)), outcome)
    }

    /// Connects to a port of worker3, and holds who answers.
    pub fn answered(&self, origin: Origin, port: u16, pod: &str) {
        let to = origin.target(false);
        let answer = self.meets(origin, (to, port), Outcome::Ok);
        assert_eq!(answer.pod.as_deref(), Some(pod), "{answer:?}");
    }

    /// A client from outside meets this at a port of worker3.
    pub fn outside(&self, port: u16, outcome: Outcome) -> Answer {
        self.meets(Origin::Outside, (HERE.v4(), port), outcome)
    }

    /// Sends what is asked, with patience where an answer is expected.
    pub fn sends(&self, origin: Origin, mut request: Connect, outcome: Outcome) -> Answer {
        request.timeout = if outcome == Outcome::Timeout { SILENCE } else { PATIENCE };
        let answer = self.lab.connect(origin, &request).unwrap();
        assert_eq!(answer.result, outcome, "{origin:?} {answer:?}");
        answer
    }

    /// `porttrace explain` on worker3, which knows what the node itself tells.
    pub fn explain(&self, arguments: &[&str]) -> Explained {
        self.explained(arguments, &[])
    }

    /// `porttrace explain --objects`.
    pub fn explain_with(&self, objects: &Objects, arguments: &[&str]) -> Explained {
        self.explained(arguments, &["--objects", &self.objects(objects)])
    }

    /// A file with these objects.
    pub fn objects(&self, objects: &Objects) -> String {
        let path = self.folder.path().join("objects.json");
        std::fs::write(&path, objects.list().to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Names of the network namespaces of worker3's pods.
    fn pods(&self) -> String {
        let here = self.lab.pods().filter(|pod| pod.spec.node == HERE);
        here.map(|pod| pod.netns.name().to_owned()).collect::<Vec<_>>().join(" ")
    }

    /// What porttrace prints on worker3.
    pub fn porttrace(&self, arguments: &[&str]) -> String {
        let mut command = self.node().command("unshare");
        command.args(["--mount", "sh", "-ec", OWN_PODS, "sh"]).arg(self.folder.path()).arg(self.pods());
        command.arg(porttrace().unwrap()).args(arguments);
        command.env("PATH", self.lab.tools.path()).env("COLUMNS", WIDTH.to_string());
        run(&mut command, None).unwrap_or_else(|error| panic!("{error:#}"))
    }

    fn explained(&self, arguments: &[&str], options: &[&str]) -> Explained {
        let told = |format: &[&str]| self.porttrace(&[&["explain"], arguments, options, format].concat());
        let json: Value = serde_json::from_str(&told(&["--json"])).unwrap();
        // Where nothing is wrong there is less to be read.
        let found = json["findings"].as_array().is_some_and(|findings| !findings.is_empty());
        let text = if found { told(&[]) } else { format!("{json:#}") };
        let explained = Explained { json, text };
        explained.text_says_the_same();
        explained
    }
}

/// `hostPort` to port 80 over TCP.
pub fn mapping(host_port: u16, host_ip: Option<Ipv4Addr>) -> porttrace_tests::lab::cni::PortMapping {
    let host_ip = host_ip.map(IpAddr::from);
    porttrace_tests::lab::cni::PortMapping { host_port, container_port: 80, protocol: "tcp", host_ip }
}

/// What `porttrace explain` said.
pub struct Explained {
    pub json: Value,
    pub text: String,
}

impl Explained {
    /// It found these, and nothing else.
    pub fn only(self, ids: &[&str]) -> Self {
        let found: BTreeSet<&str> = self.findings().filter_map(|finding| finding["id"].as_str()).collect();
        assert_eq!(found, ids.iter().copied().collect(), "{}", self.text);
        self
    }

    /// Its first verdict's outcome: `works`, `refused`, `silent`, `depends`.
    pub fn predicts(self, outcome: &str) -> Self {
        assert_eq!(self.json["verdict"][0]["outcome"], outcome, "{}", self.text);
        self
    }

    /// The sentence of the finding (or of one of several with this id) says this.
    pub fn says(self, id: &str, words: &str) -> Self {
        let said = self.all(id).any(|finding| finding["sentence"].as_str().unwrap().contains(words));
        assert!(said, "{id} does not say {words:?}:\n{}", self.text);
        self
    }

    /// A finding with this id has evidence of a kind, in whose place and text these words are.
    pub fn shows(self, id: &str, kind: &str, words: &str) -> Self {
        let has = |one: &Value| {
            let text = ["place", "text"].map(|part| one[part].as_str().unwrap_or_default()).join(" ");
            one["kind"] == kind && text.contains(words)
        };
        let shown = self.all(id).flat_map(|finding| finding["evidence"].as_array().unwrap()).any(has);
        assert!(shown, "{id} shows no {kind} with {words:?}:\n{}", self.text);
        self
    }

    /// The live evidence tells of packets that were dropped so.
    pub fn has_drops(self, how: &str) -> Self {
        let lines = self.json["live"].as_array().unwrap().iter().filter_map(Value::as_str);
        let told = lines.filter_map(|line| line.strip_prefix("packets dropped here so far, of any port: "));
        let count = told.flat_map(|line| line.split(", ")).find_map(|part| part.strip_suffix(how)?.trim().parse().ok());
        assert!(count.is_some_and(|count: u64| count > 0), "no drops {how} in\n{}", self.text);
        self
    }

    /// What the finding says to change.
    pub fn change(&self, id: &str) -> &str {
        let found = self.findings().find(|finding| finding["id"] == id);
        let finding = found.unwrap_or_else(|| panic!("no {id}:\n{}", self.text));
        finding["change"].as_str().unwrap()
    }

    fn all<'s>(&'s self, id: &'s str) -> impl Iterator<Item = &'s Value> {
        self.findings().filter(move |finding| finding["id"] == id)
    }

    fn findings(&self) -> impl Iterator<Item = &Value> {
        self.json["findings"].as_array().unwrap().iter()
    }

    fn text_says_the_same(&self) {
        // Line breaks apart, and numbers: counters go on between the two runs.
        let words = |text: &str| {
            let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
            words.chars().filter(|c| !c.is_ascii_digit()).collect::<String>()
        };
        let text = words(&self.text);
        for finding in self.findings() {
            let part = |name: &str| words(finding[name].as_str().unwrap());
            // A verdict may have said the sentence already.
            let said = format!("{}, as said above", part("id"));
            assert!(text.contains(&part("sentence")) || text.contains(&said), "{}", self.text);
            for name in ["id", "change"] {
                assert!(text.contains(&part(name)), "the text lacks {:?}:\n{}", part(name), self.text);
            }
        }
    }
}
