//! What runs beside the load: nothing, porttrace in several ways, and the tools that people use instead.

use crate::output::{self, Seen};
use crate::scene::{OTHER_PORT, Scene, WAIT};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use porttrace_tests::bpf::Attachment;
use porttrace_tests::lab::topology::{HOST_PORT, OUTSIDE_V4};
use porttrace_tests::netns::{ChildGuard, Netns};
use porttrace_user::collect::probe;
use std::ffi::OsString;
use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// How long somebody else's tool may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// One way to look, or not to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tool {
    Nothing,
    /// Programs that only return, at porttrace's hooks: what the kernel takes to come by them.
    EmptyPrograms,
    OtherPort,
    /// The text log, with the backend that porttrace chooses.
    Watch,
    /// The text log, by programs at conntrack's functions, where those can be had.
    WatchFentry,
    WatchKprobe,
    /// The text log, by conntrack's events.
    WatchCtnetlink,
    /// The text log, with a probe in the pod too.
    WatchInside,
    /// Every hop of every connection as JSON.
    WatchJson,
    ConntrackEvents,
    Tcpdump,
    XtablesMonitor,
    NftMonitor,
}

impl Tool {
    pub const ALL: [Self; 13] = [
        Self::Nothing,
        Self::EmptyPrograms,
        Self::OtherPort,
        Self::Watch,
        Self::WatchFentry,
        Self::WatchKprobe,
        Self::WatchCtnetlink,
        Self::WatchInside,
        Self::WatchJson,
        Self::ConntrackEvents,
        Self::Tcpdump,
        Self::XtablesMonitor,
        Self::NftMonitor,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::EmptyPrograms => "empty programs at porttrace's hooks",
            Self::OtherPort => "porttrace watch 9099 (another port)",
            Self::Watch => "porttrace watch 9088",
            Self::WatchFentry => "porttrace watch 9088, by fentry",
            Self::WatchKprobe => "porttrace watch 9088, by kprobe",
            Self::WatchCtnetlink => "porttrace watch 9088, by ctnetlink",
            Self::WatchInside => "porttrace watch 9088 --into-pods",
            Self::WatchJson => "porttrace watch 9088 --json",
            Self::ConntrackEvents => "conntrack -E",
            Self::Tcpdump => "tcpdump -i any port 9088 -w FILE",
            Self::XtablesMonitor => "xtables-monitor --trace (TRACE of SYNs)",
            Self::NftMonitor => "nft monitor trace (nftrace of SYNs)",
        }
    }

    /// The program that must be installed, beside porttrace.
    const fn program(self) -> Option<&'static str> {
        match self {
            Self::ConntrackEvents => Some("conntrack"),
            Self::Tcpdump => Some("tcpdump"),
            Self::XtablesMonitor => Some("xtables-monitor"),
            Self::NftMonitor => Some("nft"),
            _ => None,
        }
    }

    pub fn is_here(self) -> bool {
        let found = |program| {
            ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|place| PathBuf::from(place).join(program).exists())
        };
        match self {
            Self::EmptyPrograms => empty_at_hooks().is_ok(),
            Self::WatchFentry => probe::trials().fentry.works(),
            Self::WatchKprobe => probe::trials().kprobe.works(),
            _ => self.program().is_none_or(found),
        }
    }

    fn command(self, scene: &Scene, capture: &PathBuf) -> Option<Command> {
        let node = scene.node();
        let words = |words: &str| {
            let mut words = words.split(' ');
            let mut command = node.command(words.next().unwrap_or_default());
            command.args(words);
            command
        };
        let watch = |rest: &str| {
            let mut command = node.command(&scene.porttrace);
            command.arg("watch").args(rest.split(' ')).env("PATH", scene.lab.tools.path());
            command
        };
        Some(match self {
            Self::Nothing | Self::EmptyPrograms => return None,
            Self::OtherPort => watch(&OTHER_PORT.to_string()),
            Self::Watch => watch(&HOST_PORT.to_string()),
            Self::WatchFentry => watch(&format!("{HOST_PORT} --conntrack-backend fentry")),
            Self::WatchKprobe => watch(&format!("{HOST_PORT} --conntrack-backend kprobe")),
            Self::WatchCtnetlink => watch(&format!("{HOST_PORT} --conntrack-backend ctnetlink")),
            Self::WatchInside => watch(&format!("{HOST_PORT} --into-pods")),
            Self::WatchJson => watch(&format!("{HOST_PORT} --json")),
            Self::ConntrackEvents => words("conntrack -E"),
            Self::Tcpdump => {
                let mut command = words(&format!("tcpdump -n -i any -s 128 port {HOST_PORT} -w"));
                command.arg(capture);
                command
            }
            // Their output would be kept back until much of it is there.
            Self::XtablesMonitor => words("stdbuf -oL xtables-monitor --trace"),
            Self::NftMonitor => words("stdbuf -oL nft monitor trace"),
        })
    }

    /// How long it may be silent although it has something to say.
    const fn pause(self) -> Duration {
        match self {
            // It looks into the kernel's buffer when a second has passed, or a block of it is full.
            Self::Tcpdump => Duration::from_millis(1_300),
            _ => Duration::from_millis(300),
        }
    }

    pub fn is_porttrace(self) -> bool {
        matches!(
            self,
            Self::OtherPort
                | Self::Watch
                | Self::WatchFentry
                | Self::WatchKprobe
                | Self::WatchCtnetlink
                | Self::WatchInside
                | Self::WatchJson
        )
    }
}

/// A tool that runs and is ready; what it changed goes when this is dropped.
pub struct Beside<'a> {
    tool: Tool,
    process: Option<ChildGuard>,
    printed: PathBuf,
    capture: PathBuf,
    _rule: Option<Rule<'a>>,
    _programs: Vec<Attachment>,
}

impl<'a> Beside<'a> {
    pub fn start(tool: Tool, scene: &'a Scene) -> Result<Self> {
        let printed = scene.directory.path().join("printed");
        let capture = scene.directory.path().join("capture");
        let rule = Rule::for_tool(tool, scene.node())?;
        let programs = match tool {
            Tool::EmptyPrograms => scene.node().run_in(|| empty_programs(scene.node()))??,
            _ => Vec::new(),
        };
        let process = tool
            .command(scene, &capture)
            .map(|command| ChildGuard::spawn_to(command, File::create(&printed)?))
            .transpose()
            .with_context(|| tool.name())?;
        let beside = Self { tool, process, printed, capture, _rule: rule, _programs: programs };
        beside.wait_until_ready(scene)?;
        Ok(beside)
    }

    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(ChildGuard::id)
    }

    fn wait_until_ready(&self, scene: &Scene) -> Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        let deadline = Instant::now() + WAIT;
        let mut markers = 0;
        loop {
            let ready = match self.tool {
                Tool::Tcpdump => process.stderr.snapshot().iter().any(|line| line.contains("listening on")),
                tool if tool.is_porttrace() => output::says_ready(&self.printed)?,
                // The others say nothing when they are: a connection tells.
                _ => {
                    if markers % 10 == 0 {
                        scene.lab.outside.run_in(|| TcpStream::connect(SocketAddr::from(scene.target())))??;
                    }
                    markers += 1;
                    std::fs::metadata(&self.printed)?.len() > 0
                }
            };
            if ready {
                return Ok(());
            }
            if Instant::now() > deadline || process.stderr.wait_closed(Duration::from_millis(5)) {
                bail!("{} does not get ready: {:?}", self.tool.name(), process.stderr.snapshot());
            }
        }
    }

    /// Lets it print what it still has to, ends it, and counts what it told of the clients' connections. `None`: nothing ran,
    /// or it looked elsewhere.
    pub fn finish(mut self) -> Result<Option<Seen>> {
        let Some(process) = &mut self.process else { return Ok(None) };
        let file = if self.tool == Tool::Tcpdump { &self.capture } else { &self.printed };
        let length = || std::fs::metadata(file).map_or(0, |metadata| metadata.len());
        let deadline = Instant::now() + WAIT;
        let mut before = None;
        // What it prints last is at its end; a tool that still catches up is given the time.
        while before != Some(length()) && Instant::now() < deadline {
            before = Some(length());
            thread::sleep(self.tool.pause());
        }
        process.signal(Signal::SIGINT)?;
        if self.tool.is_porttrace() {
            process.wait(WAIT)?;
        } else if process.wait(PATIENCE).is_err() {
            // Now and then one of the monitors does not hear it.
            process.signal(Signal::SIGKILL)?;
            process.wait(WAIT)?;
        }
        let said = process.stderr.snapshot();
        Ok(match self.tool {
            Tool::Nothing | Tool::EmptyPrograms | Tool::OtherPort => None,
            Tool::Watch | Tool::WatchFentry | Tool::WatchKprobe | Tool::WatchCtnetlink | Tool::WatchInside => {
                Some(output::watch_text(&self.printed)?)
            }
            Tool::WatchJson => Some(output::watch_json(&self.printed)?),
            Tool::ConntrackEvents => Some(output::conntrack(&self.printed, &said)?),
            Tool::Tcpdump => Some(output::tcpdump(&self.capture, &said)?),
            Tool::XtablesMonitor => Some(output::xtables_monitor(&self.printed, &said)?),
            Tool::NftMonitor => Some(output::nft_monitor(&self.printed, &said)?),
        })
    }
}

/// Where porttrace hangs its programs on a node that has `tcx` and NETFILTER programs.
fn empty_programs(node: &Netns) -> Result<Vec<Attachment>> {
    let mut all = empty_at_hooks()?;
    for interface in node.links()? {
        all.extend(Attachment::of_nothing_on_both_sides(&interface)?);
    }
    Ok(all)
}

/// After conntrack, after either half of NAT and before LOCAL_IN, in the calling thread's namespace.
fn empty_at_hooks() -> Result<Vec<Attachment>> {
    const HOOKS: [(i32, i32); 7] = [
        (libc::NF_INET_PRE_ROUTING, -199),
        (libc::NF_INET_LOCAL_OUT, -199),
        (libc::NF_INET_PRE_ROUTING, -99),
        (libc::NF_INET_LOCAL_OUT, -99),
        (libc::NF_INET_LOCAL_IN, i32::MIN + 1),
        (libc::NF_INET_LOCAL_IN, 101),
        (libc::NF_INET_POST_ROUTING, 101),
    ];
    let families = [libc::NFPROTO_IPV4, libc::NFPROTO_IPV6];
    let places = families.into_iter().flat_map(|family| HOOKS.map(|(hook, priority)| (family, hook, priority)));
    places
        .map(|(family, hook, priority)| {
            Attachment::of_nothing_at_hook(family.cast_unsigned(), hook.cast_unsigned(), priority)
        })
        .collect()
}

/// The rule that a tool needs, while it runs.
struct Rule<'a> {
    netns: &'a Netns,
    remove: Vec<OsString>,
}

impl<'a> Rule<'a> {
    fn for_tool(tool: Tool, netns: &'a Netns) -> Result<Option<Self>> {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let from = OUTSIDE_V4;
        let remove = match tool {
            Tool::XtablesMonitor => {
                let rule = |verb| {
                    format!(
                        "iptables-nft -t raw -{verb} PREROUTING -s {from} -p tcp --syn --dport {HOST_PORT} -j TRACE"
                    )
                };
                netns.exec(words(&rule("A")))?;
                words(&rule("D"))
            }
            Tool::NftMonitor => {
                netns.exec(words("nft add table ip bench"))?;
                netns.exec(["nft", "add chain ip bench pre { type filter hook prerouting priority raw; }"])?;
                netns.exec(["nft", &format!("add rule ip bench pre ip saddr {from} tcp dport {HOST_PORT} tcp flags == syn meta nftrace set 1")])?;
                words("nft delete table ip bench")
            }
            _ => return Ok(None),
        };
        Ok(Some(Self { netns, remove }))
    }
}

impl Drop for Rule<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.netns.exec(&self.remove) {
            eprintln!("a rule of the measurement stays in the lab: {error:#}");
        }
    }
}
