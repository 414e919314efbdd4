//! Whether something about a network namespace changed: its interfaces, addresses, routes or policy rules (rtnetlink's groups).

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use std::io;

/// `RTNLGRP_*` (include/uapi/linux/rtnetlink.h): links, nexthop objects; addresses, routes and policy rules of both families.
const GROUPS: [u32; 8] = [1, 32, 5, 7, 8, 9, 11, 19];

/// Hears of every change since it was made.
pub struct NetworkChanges {
    socket: Socket,
}

impl NetworkChanges {
    /// Those of the calling thread's network namespace.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self { socket })
    }

    /// Whether there were any since the last call; does not wait. What it was, a listing has to say.
    pub fn any(&self) -> bool {
        let mut heard = false;
        loop {
            // The kernel cuts off what does not fit.
            let mut start = [0u8; 16];
            match self.socket.recv(&mut &mut start[..], 0) {
                Ok(_) => heard = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return heard,
                // More than there was room for; the rest can be read.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => heard = true,
                Err(_) => return true,
            }
        }
    }
}
