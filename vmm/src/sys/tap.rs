// UNSAFETY: the calls that set up a tap take a number, or a structure by address; it is a local one.
#![expect(unsafe_code, reason = "ioctl takes its argument by address")]
//! The kernel's tap devices: a descriptor whose packets are those of a network interface.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What the other end of a tap does by itself to packets that it is given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offload {
    /// Reads packets whose checksum is only begun.
    pub checksum: bool,
    /// Reads TCP segments of IPv4 that are too long for the wire.
    pub tso4: bool,
    /// Reads TCP segments of IPv6 that are too long for the wire.
    pub tso6: bool,
    /// Such segments may be marked as having met congestion.
    pub ecn: bool,
    /// Reads UDP datagrams that are too long for the wire.
    pub ufo: bool,
}

impl Offload {
    fn bits(self) -> libc::c_uint {
        let bit = |is_on, bit| if is_on { bit } else { 0 };
        bit(self.checksum, libc::TUN_F_CSUM)
            | bit(self.tso4, libc::TUN_F_TSO4)
            | bit(self.tso6, libc::TUN_F_TSO6)
            | bit(self.ecn, libc::TUN_F_TSO_ECN)
            | bit(self.ufo, libc::TUN_F_UFO)
    }
}

/// Makes `tun`, which is `/dev/net/tun`, the tap `name`: whole packets, each behind a header of
/// `header_bytes` bytes as virtio has it.
pub fn attach(tun: BorrowedFd<'_>, name: &str, header_bytes: u8) -> io::Result<()> {
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        flags: i16,
        padding: [u8; 22],
    }
    const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        flags: i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
            .unwrap_or_default(),
        padding: [0; 22],
    };
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (place, byte) in request.name.iter_mut().zip(name.bytes()) {
        *place = byte;
    }
    // SAFETY: the descriptor is open, and `request` is as long as the structure that the kernel reads
    // and writes.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    result(done)?;
    let header_bytes = libc::c_int::from(header_bytes);
    // SAFETY: the descriptor is open, and the kernel reads one number at the address.
    let done = unsafe {
        libc::ioctl(
            tun.as_raw_fd(),
            libc::TUNSETVNETHDRSZ,
            &raw const header_bytes,
        )
    };
    result(done)
}

/// Says what whoever reads the tap can do.
pub fn set_offload(tap: BorrowedFd<'_>, offload: Offload) -> io::Result<()> {
    let bits = libc::c_ulong::from(offload.bits());
    // SAFETY: the descriptor is open, and the argument is a number.
    result(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, bits) })
}

fn result(done: libc::c_int) -> io::Result<()> {
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
