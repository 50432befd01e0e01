#![forbid(unsafe_code)]
//! The other ends of ports and monitors: `-chardev`, and the short forms of `-serial`, `-qmp` and
//! `-monitor`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::hub::Log;
use super::memory::is_identifier;
use crate::qemu::error::{OptionError, missing, no_identifier};
use crate::qemu::words::{Form, Props};

/// Where a port or monitor goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chardev {
    /// Nothing is there.
    Null,
    /// This process's standard input and output.
    Stdio,
    /// A new pseudo-terminal.
    Pty,
    /// A file, written only.
    File {
        /// Which.
        path: PathBuf,
        /// Whether what is in it stays.
        append: bool,
    },
    /// One that several use, or that has a log: its number among [`Hubs`](super::hub::Hubs).
    Hub(usize),
    /// A socket.
    Socket {
        /// Its address.
        address: Address,
        /// Whether to listen and, if so, whether to wait for the first client.
        role: Role,
    },
}

impl Chardev {
    /// Whether it is a socket at this path.
    pub fn is_at(&self, socket: &Path) -> bool {
        matches!(self, Self::Socket { address: Address::Unix(path), .. } if path == socket)
    }
}

/// Address of a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A path.
    Unix(PathBuf),
    /// An address of this host's loopback.
    Tcp(SocketAddr),
}

/// What a socket does first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It connects.
    Client,
    /// It listens.
    Server {
        /// Whether the start waits for the first client.
        wait: bool,
    },
}

/// A `-chardev` with its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedChardev {
    /// What `-serial chardev:ID` and `-mon` call it.
    pub id: String,
    /// Where it goes.
    pub chardev: Chardev,
    /// Whether several may use it.
    pub mux: bool,
    /// A copy of what it shows.
    pub log: Option<Log>,
}

/// Reads the text of `-chardev`.
pub fn named(text: &str) -> Result<NamedChardev, OptionError> {
    let mut props = Props::parse(text, Some("backend"), Form::Switches)?;
    let backend = props.text("backend")?;
    let id = props
        .text("id")?
        .ok_or_else(|| OptionError::new("chardev: no id specified"))?;
    if !is_identifier(&id) {
        return Err(no_identifier());
    }
    let backend =
        backend.ok_or_else(|| OptionError::new(format!("chardev: \"{id}\" missing backend")))?;
    let chardev = match backend.as_str() {
        "null" => Chardev::Null,
        "stdio" => {
            if props.switch("signal")? == Some(false) {
                return Err(OptionError::new(
                    "signal=off cannot be had: in a terminal Ctrl-A x ends Pando, Ctrl-C goes to the guest",
                ));
            }
            Chardev::Stdio
        }
        "pty" => Chardev::Pty,
        "file" => file(&mut props)?,
        "socket" => socket(&mut props)?,
        other => return Err(no_backend(other)),
    };
    let mux = props.switch("mux")?.unwrap_or(false);
    let log = Log::read(&mut props)?;
    props.finish()?;
    Ok(NamedChardev {
        id,
        chardev,
        mux,
        log,
    })
}

/// What a short form means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Short {
    /// Nothing is wanted.
    None,
    /// A `-chardev` of this id.
    Named(String),
    /// A chardev of its own.
    Own(Chardev),
    /// A chardev that it shares with a monitor.
    Mon(Chardev),
}

/// Reads `stdio`, `unix:PATH,server=on,wait=off` and so on.
pub fn short(text: &str) -> Result<Short, OptionError> {
    if let Some(shared) = text.strip_prefix("mon:") {
        return match short(shared)? {
            Short::Own(chardev) => Ok(Short::Mon(chardev)),
            _ => Err(OptionError::new(format!(
                "'{text}' has nothing that a monitor could share: use mon:stdio, or -chardev with mux=on and -mon"
            ))),
        };
    }
    let (kind, rest) = match text.split_once(':') {
        Some((kind, rest)) => (kind, Some(rest)),
        None => (text, None),
    };
    let own = |chardev| Ok(Short::Own(chardev));
    match (kind, rest) {
        ("none", None) => Ok(Short::None),
        ("null", None) => own(Chardev::Null),
        ("stdio", None) => own(Chardev::Stdio),
        ("pty", None) => own(Chardev::Pty),
        ("chardev", Some(id)) => Ok(Short::Named(id.to_owned())),
        ("file", Some(rest)) => {
            let mut props = Props::parse(rest, Some("path"), Form::Switches)?;
            let chardev = file(&mut props)?;
            props.finish()?;
            own(chardev)
        }
        ("unix", Some(rest)) => {
            let mut props = Props::parse(rest, Some("path"), Form::Switches)?;
            let chardev = socket(&mut props)?;
            props.finish()?;
            own(chardev)
        }
        ("tcp" | "telnet", Some(rest)) => {
            let (address, options) = rest.split_once(',').unwrap_or((rest, ""));
            let (host, port) = address
                .rsplit_once(':')
                .ok_or_else(|| OptionError::new(format!("'{rest}' has no port")))?;
            let mut props = Props::parse(options, None, Form::Switches)?;
            props.add("host", host);
            props.add("port", port);
            if kind == "telnet" {
                props.add("telnet", "on");
            }
            let chardev = socket(&mut props)?;
            props.finish()?;
            own(chardev)
        }
        ("vc", _) => Err(OptionError::new(
            "vc cannot be had: there is no display; use stdio, pty or unix:PATH",
        )),
        _ => Err(OptionError::new(format!(
            "'{text}' is not a valid char driver name, or one that Pando does not have: use stdio, null, \
             pty, file:PATH, unix:PATH,server=on or tcp:127.0.0.1:PORT,server=on"
        ))),
    }
}

fn no_backend(backend: &str) -> OptionError {
    OptionError::new(format!(
        "'{backend}' is not a valid char driver name, or one that Pando does not have: use stdio, null, \
         pty, file or socket"
    ))
}

fn file(props: &mut Props) -> Result<Chardev, OptionError> {
    Ok(Chardev::File {
        path: props
            .text("path")?
            .ok_or_else(|| OptionError::new("chardev: file: no filename given"))?
            .into(),
        append: props.switch("append")?.unwrap_or(false),
    })
}

fn socket(props: &mut Props) -> Result<Chardev, OptionError> {
    let server = props.switch("server")?.unwrap_or(false);
    let wait = props.switch("wait")?;
    if !server && wait.is_some() {
        return Err(OptionError::new(
            "'wait' option is incompatible with socket in client connect mode",
        ));
    }
    for name in ["telnet", "websocket", "tn3270", "fd", "tls-creds"] {
        if props.has(name) {
            let value = props.text(name)?;
            if value.as_deref() != Some("off") {
                return Err(OptionError::new(format!(
                    "{name} cannot be had: use a plain socket"
                )));
            }
        }
    }
    // Without them a client that went away stays away, and small packets are sent at once.
    for name in ["reconnect", "reconnect-ms"] {
        if props.number(name)?.is_some_and(|value| value != 0) {
            return Err(OptionError::new(format!(
                "{name} cannot be had: let Pando listen (server=on) instead"
            )));
        }
    }
    props.switch("nodelay")?;
    let role = if server {
        Role::Server {
            wait: wait.unwrap_or(true),
        }
    } else {
        Role::Client
    };
    Ok(Chardev::Socket {
        address: address(props)?,
        role,
    })
}

fn address(props: &mut Props) -> Result<Address, OptionError> {
    if let Some(path) = props.text("path")? {
        if path.is_empty() {
            return Err(missing("path"));
        }
        return Ok(Address::Unix(path.into()));
    }
    let Some(port) = props.text("port")? else {
        if props.has("host") {
            return Err(OptionError::new("chardev: socket: no port given"));
        }
        return Err(OptionError::new("chardev: socket: no host or path given"));
    };
    let host = props.text("host")?.unwrap_or_default();
    props.switch("ipv4")?;
    props.switch("ipv6")?;
    let host = match host.as_str() {
        "" | "localhost" => "127.0.0.1",
        "::1" | "[::1]" => "[::1]",
        other => other,
    };
    let address: SocketAddr = format!("{host}:{port}").parse().map_err(|_| {
        OptionError::new(format!(
            "'{host}:{port}' is no address with a port: give one like 127.0.0.1:4444"
        ))
    })?;
    if !address.ip().is_loopback() {
        return Err(OptionError::new(format!(
            "{address} is not this host's loopback: a monitor has no password; listen on 127.0.0.1, and \
             forward the port where it must be reached from outside"
        )));
    }
    Ok(Address::Tcp(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(text: &str) -> Chardev {
        match short(text).unwrap() {
            Short::Own(chardev) => chardev,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn short_forms_are_read() {
        assert_eq!(short("none"), Ok(Short::None));
        assert_eq!(short("mon:stdio"), Ok(Short::Mon(Chardev::Stdio)));
        short("mon:chardev:c").unwrap_err();
        assert_eq!(short("chardev:c"), Ok(Short::Named("c".into())));
        let server = |wait| Chardev::Socket {
            address: Address::Unix("q.sock".into()),
            role: Role::Server { wait },
        };
        assert_eq!(own("unix:q.sock,server=on,wait=off"), server(false));
        assert_eq!(own("unix:q.sock,server,nowait"), server(false));
        assert_eq!(own("unix:q.sock,server=on"), server(true));
        assert_eq!(
            own("tcp:127.0.0.1:4444,server=on,wait=off"),
            Chardev::Socket {
                address: Address::Tcp("127.0.0.1:4444".parse().unwrap()),
                role: Role::Server { wait: false },
            }
        );
        assert_eq!(
            own("tcp::4444"),
            Chardev::Socket {
                address: Address::Tcp("127.0.0.1:4444".parse().unwrap()),
                role: Role::Client,
            }
        );
        assert_eq!(
            own("file:/a:b"),
            Chardev::File {
                path: "/a:b".into(),
                append: false
            }
        );
    }

    #[test]
    fn long_forms_are_read() {
        let c = named("socket,id=qmp,path=/q,server=on,wait=off").unwrap();
        assert_eq!(c.id, "qmp");
        named("socket,id=q,host=127.0.0.1,port=1,server=on").unwrap();
        named("stdio,id=s,signal=on").unwrap();
        let m = named("stdio,id=m,mux=on,logfile=l,logappend=on").unwrap();
        assert!(m.mux && m.log.unwrap().append);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let message = |text| named(text).unwrap_err().to_string();
        assert_eq!(message("stdio"), "chardev: no id specified");
        assert_eq!(
            message("socket,id=q,path=x,wait=off"),
            "'wait' option is incompatible with socket in client connect mode"
        );
        assert_eq!(message("null,id=n,foo=1"), "Invalid parameter 'foo'");
        assert!(message("spicevmc,id=s").starts_with("'spicevmc' is not a valid char driver"));
        assert!(
            short("tcp:0.0.0.0:1,server=on")
                .unwrap_err()
                .to_string()
                .contains("loopback")
        );
        assert!(short("vc").unwrap_err().to_string().contains("no display"));
    }
}
