//! A classic BPF filter on a netlink socket: only messages about entries whose original destination port is wanted.

use std::io;
use std::os::fd::RawFd;

/// Opcodes (include/uapi/linux/bpf_common.h) and ancillary loads (linux/filter.h).
const LD_IMM: u16 = 0x00;
const LDX_IMM: u16 = 0x01;
const LD_W_ABS: u16 = 0x20;
const LD_H_IND: u16 = 0x48;
const JEQ: u16 = 0x15;
const TAX: u16 = 0x07;
const RET: u16 = 0x06;
const ANCILLARY: u32 = 0xffff_f000;
const NLATTR: u32 = ANCILLARY + 12;
const NLATTR_NEST: u32 = ANCILLARY + 16;

/// `CTA_TUPLE_ORIG`, `CTA_TUPLE_PROTO`, `CTA_PROTO_DST_PORT`.
const PATH: [u32; 3] = [1, 2, 3];
/// Behind `struct nlmsghdr` and `struct nfgenmsg`.
const ATTRIBUTES: u32 = 20;
/// A jump goes 255 instructions at most; with more ports everything is let through, and sorted out by the reader.
const MOST_PORTS: usize = 200;

/// Filters what the socket receives from now on.
pub fn attach(socket: RawFd, ports: &[u16]) -> io::Result<()> {
    if ports.len() > MOST_PORTS {
        return Ok(());
    }
    let mut program = program(ports);
    let length = program.len() as u16;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which outlives the call.
    let answer = unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn program(ports: &[u16]) -> Vec<libc::sock_filter> {
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // From "not found" to the end that rejects: over what is left of the search, and over the ports.
    let mut program = vec![step(LD_IMM, 0, 0, ATTRIBUTES)];
    let search: usize = PATH.len() * 3;
    for (index, kind) in PATH.into_iter().enumerate() {
        program.push(step(LDX_IMM, 0, 0, kind));
        program.push(step(LD_W_ABS, 0, 0, if index == 0 { NLATTR } else { NLATTR_NEST }));
        let rest = search - (index + 1) * 3 + 2 + ports.len();
        program.push(step(JEQ, rest as u8, 0, 0));
    }
    program.push(step(TAX, 0, 0, 0));
    program.push(step(LD_H_IND, 0, 0, 4));
    for (index, port) in ports.iter().enumerate() {
        let accept = ports.len() - index;
        program.push(step(JEQ, accept as u8, 0, u32::from(*port)));
    }
    program.push(step(RET, 0, 0, 0));
    program.push(step(RET, 0, 0, u32::MAX));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would (net/core/filter.c), on a message of nested attributes.
    fn accepts(program: &[libc::sock_filter], message: &[u8]) -> bool {
        let (mut a, mut x, mut at) = (0u32, 0u32, 0usize);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                LD_IMM => a = k,
                LDX_IMM => x = k,
                TAX => x = a,
                LD_H_IND => {
                    let at = (x + k) as usize;
                    a = u32::from(u16::from_be_bytes([message[at], message[at + 1]]));
                }
                LD_W_ABS => a = find(message, a, x, k == NLATTR_NEST),
                JEQ => at += usize::from(if a == k { jt } else { jf }),
                RET => return k != 0,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    fn find(message: &[u8], from: u32, wanted: u32, nested: bool) -> u32 {
        let length = |at: usize| usize::from(u16::from_ne_bytes([message[at], message[at + 1]]));
        let from = from as usize;
        let (mut at, end) = if nested { (from + 4, from + length(from)) } else { (from, message.len()) };
        while at + 4 <= end {
            let kind = u16::from_ne_bytes([message[at + 2], message[at + 3]]) & 0x3fff;
            if u32::from(kind) == wanted {
                return at as u32;
            }
            at += length(at).next_multiple_of(4);
        }
        0
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// An entry with original ports 50000 → `dport`, its reply from port 80.
    fn message(dport: u16) -> Vec<u8> {
        let ports = |sport: u16, dport: u16| {
            [attribute(1, &[6]), attribute(2, &sport.to_be_bytes()), attribute(3, &dport.to_be_bytes())].concat()
        };
        let tuple = |sport, dport| [attribute(0x8001, &[0; 24]), attribute(0x8002, &ports(sport, dport))].concat();
        [vec![0; 20], attribute(0x8001, &tuple(50_000, dport)), attribute(0x8002, &tuple(80, 50_000))].concat()
    }

    #[test]
    fn only_the_original_destination_port_counts() {
        let program = program(&[9088, 30080]);
        assert!(accepts(&program, &message(9088)));
        assert!(accepts(&program, &message(30080)));
        assert!(!accepts(&program, &message(80)));
        assert!(!accepts(&program, &message(50_000)));
        assert!(!accepts(&program, &[0; 20]), "no attributes");
        let icmp = [vec![0; 20], attribute(0x8001, &attribute(0x8002, &attribute(1, &[1])))].concat();
        assert!(!accepts(&program, &icmp), "no ports");
    }
}
