//! A NodePort served by eBPF programs at TC instead of by rules, in the way of Cilium: what comes for it is sent to a pod, and
//! the pod's answers go back in the node's name. TCP over IPv4, one pod of the same node, also for clients on the node.

use crate::bpf::{self, Attachment};
use anyhow::{Context, Result};
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, OwnedFd};

/// The programs in their places; dropping it removes them.
pub struct NodePort {
    _clients: OwnedFd,
    _programs: Vec<Attachment>,
}

impl NodePort {
    /// Serves `node` from the pod at `pod`, in the calling thread's network namespace: at the uplink for clients from elsewhere, at
    /// lo for those of this node, at the pod's interface for the answers. The latter must accept the node's own address as source
    /// (`accept_local`).
    pub fn serve(node: SocketAddrV4, pod: SocketAddrV4, uplink: &str, pods: &str) -> Result<Self> {
        let clients = bpf::hash_map(size_of::<[u32; 2]>(), size_of::<u32>())?;
        let map = clients.as_raw_fd();
        let towards = nix::net::if_::if_nametoindex(pods).with_context(|| format!("looking for {pods}"))?;
        let places = [
            ("nodeport_in", there(map, node, pod, Onward::Stack), uplink, bpf::TCX_INGRESS),
            ("nodeport_local", there(map, node, pod, Onward::Out(towards)), "lo", bpf::TCX_EGRESS),
            ("nodeport_back", back(map, node, pod), pods, bpf::TCX_INGRESS),
        ];
        let attach = |(name, code, interface, side): (_, Vec<u64>, _, _)| Attachment::new(name, &code, interface, side);
        let programs = places.into_iter().map(attach).collect::<Result<_>>()?;
        Ok(Self { _clients: clients, _programs: programs })
    }
}

/// Where a packet goes once it has its new destination.
#[derive(Clone, Copy)]
enum Onward {
    /// Up the node's stack, which routes it.
    Stack,
    /// Out of this interface at once.
    Out(u32),
}

/// Offsets in a frame: of Ethernet's, IPv4's (without options) and TCP's header.
const IP: i32 = 14;
const TCP: i32 = IP + 20;
/// On the stack: IPv4's header and TCP's ports, a client (address, port), a value.
const HEADER: i16 = -40;
const CLIENT: i16 = -16;
const VALUE: i16 = -8;
/// Offsets in what [`HEADER`] holds.
const PROTOCOL: i16 = 9;
const SOURCE: i16 = 12;
const DESTINATION: i16 = 16;
const SOURCE_PORT: i16 = 20;
const DESTINATION_PORT: i16 = 22;

/// Packets to the NodePort: the client is remembered, the destination becomes the pod.
fn there(clients: i32, node: SocketAddrV4, pod: SocketAddrV4, onward: Onward) -> Vec<u64> {
    let mut code = Code::default();
    code.read_header();
    code.unless_word_pass(DESTINATION, address(node));
    code.unless_half_pass(DESTINATION_PORT, port(node));
    code.client(SOURCE, SOURCE_PORT);
    code.store_word(VALUE, 1);
    code.map(R1, clients);
    code.pointer(R2, CLIENT);
    code.pointer(R3, VALUE);
    code.set(R4, 0);
    code.call(MAP_UPDATE);
    code.rewrite(IP + i32::from(DESTINATION), TCP + 2, node, pod);
    match onward {
        Onward::Stack => code.set(R0, TCX_PASS),
        Onward::Out(interface) => {
            code.set(R1, interface.cast_signed());
            [R2, R3, R4].into_iter().for_each(|register| code.set(register, 0));
            code.call(REDIRECT_NEIGHBOUR);
        }
    }
    code.end()
}

/// The pod's answers to clients that came by the NodePort: the source becomes the node.
fn back(clients: i32, node: SocketAddrV4, pod: SocketAddrV4) -> Vec<u64> {
    let mut code = Code::default();
    code.read_header();
    code.unless_word_pass(SOURCE, address(pod));
    code.unless_half_pass(SOURCE_PORT, port(pod));
    code.client(DESTINATION, DESTINATION_PORT);
    code.map(R1, clients);
    code.pointer(R2, CLIENT);
    code.call(MAP_LOOKUP);
    code.if_zero_pass(R0);
    code.rewrite(IP + i32::from(SOURCE), TCP, pod, node);
    code.set(R0, TCX_PASS);
    code.end()
}

/// As they stand in a packet, read as native numbers.
fn address(of: SocketAddrV4) -> i32 {
    i32::from_ne_bytes(of.ip().octets())
}

fn port(of: SocketAddrV4) -> i32 {
    u16::from_ne_bytes(of.port().to_be_bytes()).into()
}

type Register = u8;
const R0: Register = 0;
const R1: Register = 1;
const R2: Register = 2;
const R3: Register = 3;
const R4: Register = 4;
const R5: Register = 5;
/// Keeps the packet's context.
const CONTEXT: Register = 6;
/// Points to the end of the stack.
const FRAME: Register = 10;

/// Helpers (`enum bpf_func_id`).
const MAP_LOOKUP: i32 = 1;
const MAP_UPDATE: i32 = 2;
const STORE_BYTES: i32 = 9;
const L3_CHECKSUM: i32 = 10;
const L4_CHECKSUM: i32 = 11;
const LOAD_BYTES: i32 = 26;
const REDIRECT_NEIGHBOUR: i32 = 152;

/// The checksum covers the address as part of the pseudo header (`BPF_F_PSEUDO_HDR`).
const PSEUDO: i32 = 0x10;
/// Go on without asking other programs, or with asking them.
const TCX_PASS: i32 = 0;
const TCX_NEXT: i32 = -1;

/// Sizes of memory accesses (`BPF_W`, `BPF_H`, `BPF_B`).
const WORD: u8 = 0x00;
const HALF: u8 = 0x08;
const BYTE: u8 = 0x10;

/// Instructions (`struct bpf_insn`); jumps to the end, where the packet is passed on untouched, are filled in there.
#[derive(Default)]
struct Code {
    instructions: Vec<u64>,
    jumps: Vec<usize>,
}

impl Code {
    fn push(&mut self, opcode: u8, dst: Register, src: Register, offset: i16, value: i32) {
        let ([o0, o1], [v0, v1, v2, v3]) = (offset.to_ne_bytes(), value.to_ne_bytes());
        self.instructions.push(u64::from_ne_bytes([opcode, src << 4 | dst, o0, o1, v0, v1, v2, v3]));
    }

    /// `dst = value` (64 bits).
    fn set(&mut self, dst: Register, value: i32) {
        self.push(0xb7, dst, 0, 0, value);
    }

    fn copy(&mut self, dst: Register, src: Register) {
        self.push(0xbf, dst, src, 0, 0);
    }

    /// `dst = address of this place on the stack`.
    fn pointer(&mut self, dst: Register, place: i16) {
        self.copy(dst, FRAME);
        self.push(0x07, dst, 0, 0, place.into());
    }

    fn load(&mut self, size: u8, dst: Register, place: i16) {
        self.push(0x61 | size, dst, FRAME, place, 0);
    }

    /// Puts a number on the stack.
    fn store_word(&mut self, place: i16, value: i32) {
        self.push(0x62, FRAME, 0, place, value);
    }

    /// `dst = this map`.
    fn map(&mut self, dst: Register, map: i32) {
        const MAP_FD: u8 = 1;
        self.push(0x18, dst, MAP_FD, 0, map);
        self.push(0, 0, 0, 0, 0);
    }

    fn call(&mut self, helper: i32) {
        self.push(0x85, 0, 0, 0, helper);
    }

    /// Calls a helper for the packet with these arguments.
    fn call_for_packet<const N: usize>(&mut self, helper: i32, arguments: [i32; N]) {
        self.copy(R1, CONTEXT);
        (R2..=R5).zip(arguments).for_each(|(register, argument)| self.set(register, argument));
        self.call(helper);
    }

    fn jump_to_pass(&mut self, opcode: u8, register: Register, value: i32) {
        self.jumps.push(self.instructions.len());
        self.push(opcode, register, 0, 0, value);
    }

    fn if_zero_pass(&mut self, register: Register) {
        self.jump_to_pass(0x15, register, 0);
    }

    /// Compares 32 bits.
    fn unless_pass(&mut self, register: Register, value: i32) {
        self.jump_to_pass(0x56, register, value);
    }

    fn unless_word_pass(&mut self, part: i16, value: i32) {
        self.load(WORD, R1, HEADER + part);
        self.unless_pass(R1, value);
    }

    fn unless_half_pass(&mut self, part: i16, value: i32) {
        self.load(HALF, R1, HEADER + part);
        self.unless_pass(R1, value);
    }

    /// Reads the headers of a TCP packet over IPv4; passes all others on.
    fn read_header(&mut self) {
        const VERSION_AND_LENGTH: i32 = 0x45;
        self.copy(CONTEXT, R1);
        self.set(R2, IP);
        self.pointer(R3, HEADER);
        self.set(R4, 24);
        self.call(LOAD_BYTES);
        self.unless_pass(R0, 0);
        self.load(BYTE, R1, HEADER);
        self.unless_pass(R1, VERSION_AND_LENGTH);
        self.load(BYTE, R1, HEADER + PROTOCOL);
        self.unless_pass(R1, libc::IPPROTO_TCP);
    }

    /// Puts the client's address and port in their place.
    fn client(&mut self, address: i16, port: i16) {
        for (size, part, place) in [(WORD, address, CLIENT), (HALF, port, CLIENT + 4)] {
            self.load(size, R1, HEADER + part);
            self.push(0x63, FRAME, R1, place, 0);
        }
    }

    /// Writes another address and port into the packet at these offsets, with the checksums that cover them.
    fn rewrite(&mut self, address_at: i32, port_at: i32, from: SocketAddrV4, to: SocketAddrV4) {
        const OF_IP: i32 = IP + 10;
        const OF_TCP: i32 = TCP + 16;
        self.call_for_packet(L4_CHECKSUM, [OF_TCP, address(from), address(to), PSEUDO | 4]);
        self.call_for_packet(L4_CHECKSUM, [OF_TCP, port(from), port(to), 2]);
        self.call_for_packet(L3_CHECKSUM, [OF_IP, address(from), address(to), 4]);
        for (at, value, length) in [(address_at, address(to), 4), (port_at, port(to), 2)] {
            self.store_word(VALUE, value);
            self.copy(R1, CONTEXT);
            self.set(R2, at);
            self.pointer(R3, VALUE);
            self.set(R4, length);
            self.set(R5, 0);
            self.call(STORE_BYTES);
        }
    }

    /// Returns what is in R0; and where the packet is none of ours, has the next program see it.
    fn end(mut self) -> Vec<u64> {
        const EXIT: u8 = 0x95;
        self.push(EXIT, 0, 0, 0, 0);
        let end = self.instructions.len();
        self.set(R0, TCX_NEXT);
        self.push(EXIT, 0, 0, 0, 0);
        for at in self.jumps {
            let distance = (end - at - 1) as u64;
            self.instructions[at] |= distance << 16;
        }
        self.instructions
    }
}
