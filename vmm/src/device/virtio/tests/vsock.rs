#![forbid(unsafe_code)]
//! Connections between a guest and programs of the host.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::driver::{EVENT_INDEX, VERSION_1};
use super::vsock_guest::{
    CID, CREDIT_REQUEST, CREDIT_UPDATE, DATA, EVENT, Guest, Packet, REQUEST, RESET, RESPONSE, RX,
    SHUTDOWN, TX, device,
};
use super::vsock_host::{Host, LIMIT, connected, dialled, is_closed, read};
use crate::device::virtio::device::VirtioDevice;
use crate::device::virtio::vsock::state::VsockState;

/// What the guest may send before it hears of more room.
const ROOM: u32 = 64 << 10;

#[test]
fn a_program_of_the_host_reaches_the_guest() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX] {
        let host = Host::new();
        let mut guest = Guest::new(&host.path());
        guest.set_up(features);
        assert_eq!(guest.rings.driver.read(0x2000, 8), u64::from(CID));
        let mut stream = host.connect(52);
        let request = guest.receive();
        assert_eq!(
            (request.cids, request.kind, request.op, request.room),
            ((2, CID.into()), 1, REQUEST, ROOM)
        );
        assert!(request.ports.0 >= 1 << 30 && request.ports.1 == 52);
        let ports = (52, request.ports.0);
        guest.send(&Packet::new(RESPONSE, ports));
        let line = format!("OK {}\n", ports.1);
        assert_eq!(read(&mut stream, line.len()), line.as_bytes());
        stream.write_all(b"to the guest").unwrap();
        let packet = guest.receive();
        assert_eq!((packet.op, &*packet.data), (DATA, &b"to the guest"[..]));
        let mut answer = Packet::new(DATA, ports);
        answer.data = b"to the host".to_vec();
        guest.send(&answer);
        assert_eq!(read(&mut stream, 11), b"to the host");
        // The host sends no more, but reads.
        stream.shutdown(Shutdown::Write).unwrap();
        let packet = guest.receive();
        assert_eq!((packet.op, packet.flags), (SHUTDOWN, 2));
        guest.send(&answer);
        assert_eq!(read(&mut stream, 11), b"to the host");
        drop(stream);
        let packet = guest.receive();
        assert_eq!((packet.op, packet.flags), (SHUTDOWN, 3));
        guest.send(&Packet::new(RESET, ports));
        // It is forgotten.
        guest.send(&answer);
        assert_eq!((guest.receive().op, guest.settled()), (RESET, vec![]));
    }
}

#[test]
fn the_guest_reaches_a_program_of_the_host() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let listener = host.listen(99);
    let (mut stream, ports) = dialled(&listener, &mut guest);
    let mut packet = Packet::new(DATA, ports);
    packet.data = vec![7; 3000];
    guest.send(&packet);
    assert_eq!(read(&mut stream, 3000), [7; 3000]);
    // More than a packet of the guest's has room for.
    stream.write_all(&[8; 10_000]).unwrap();
    let mut data = Vec::new();
    while data.len() < 10_000 {
        data.extend(guest.receive().data);
    }
    assert_eq!(data, [8; 10_000]);
    // The guest says that it sends no more, then that it receives no more.
    let mut end = Packet::new(SHUTDOWN, ports);
    end.flags = 2;
    guest.send(&end);
    assert!(is_closed(&mut stream));
    end.flags = 1;
    guest.send(&end);
    assert_eq!(guest.receive().op, RESET, "both directions are over");
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

#[test]
fn what_is_not_there_is_refused_and_a_refusal_is_not() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    for op in [
        REQUEST,
        RESPONSE,
        SHUTDOWN,
        DATA,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
        0,
        8,
        0xffff,
    ] {
        guest.send(&Packet::new(op, (5, 6)));
        let answer = guest.receive();
        assert_eq!(
            (answer.op, answer.ports, answer.kind),
            (RESET, (6, 5), 1),
            "{op}"
        );
    }
    // Datagrams.
    let _listener = host.listen(99);
    let mut other = Packet::new(REQUEST, (5, 99));
    other.kind = 2;
    guest.send(&other);
    assert_eq!(guest.receive().op, RESET);
    // From somebody else, for somebody else, a refusal, and what is no packet.
    for (cids, op) in [((43, 2), REQUEST), ((42, 3), REQUEST), ((42, 2), RESET)] {
        let mut packet = Packet::new(op, (5, 6));
        packet.cids = cids;
        guest.send(&packet);
    }
    let mut short = Packet::new(DATA, (5, 6)).bytes();
    short[24] = 1;
    guest.send_bytes(&short);
    guest.send_bytes(&short[..43]);
    guest.send(&Packet::new(DATA, (5, 7)));
    assert_eq!(guest.receive().ports, (7, 5));
    assert_eq!(guest.settled(), []);
}

#[test]
fn what_no_connection_may_do_ends_it() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let listener = host.listen(99);
    for wrong in [REQUEST, RESPONSE, 0, 99] {
        let (mut stream, ports) = dialled(&listener, &mut guest);
        guest.send(&Packet::new(wrong, ports));
        assert_eq!(guest.receive().op, RESET, "{wrong}");
        assert!(is_closed(&mut stream));
    }
    let (mut stream, ports) = dialled(&listener, &mut guest);
    guest.send(&Packet::new(RESET, ports));
    assert!(is_closed(&mut stream));
    // A program of the host that the guest refuses, and one that says something else first.
    let mut refused = host.connect(1);
    let request = guest.receive();
    guest.send(&Packet::new(RESET, (1, request.ports.0)));
    assert!(is_closed(&mut refused));
    let mut stranger = UnixStream::connect(host.path()).unwrap();
    stranger.set_read_timeout(Some(LIMIT)).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(is_closed(&mut stranger));
    assert_eq!(guest.settled(), []);
}

#[test]
fn the_guest_is_never_sent_more_than_it_has_room_for() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let (mut stream, ports) = connected(&host, &mut guest);
    let mut update = Packet::new(CREDIT_UPDATE, ports);
    update.room = 100;
    guest.send(&update);
    let sent: Vec<u8> = (0..=255).collect();
    stream.write_all(&sent).unwrap();
    let mut data = Vec::new();
    while data.len() < sent.len() {
        let packet = guest.receive();
        if packet.op == CREDIT_REQUEST {
            let received = u32::try_from(data.len()).unwrap();
            assert_eq!(received - update.read, 100, "all that it has room for");
            update.read = received;
            guest.send(&update);
        } else {
            assert_eq!(packet.op, DATA);
            data.extend(packet.data);
            assert!(data.len() <= update.read as usize + 100);
        }
    }
    assert_eq!(data, sent);
    // Nonsense gets nothing.
    update.read = 1 << 31;
    guest.send(&update);
    stream.write_all(&sent).unwrap();
    assert_eq!(guest.receive().op, CREDIT_REQUEST);
    assert_eq!(guest.settled(), []);
}

#[test]
fn a_host_that_does_not_read_holds_up_its_own_connection_only() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let listener = host.listen(99);
    let (mut stream, ports) = dialled(&listener, &mut guest);
    let mut packet = Packet::new(DATA, ports);
    packet.data = vec![3; 16 << 10];
    let (mut sent, mut told) = (0_u32, 0);
    // Until nothing more is taken: the stream is full, and so is the room.
    while sent - told < ROOM {
        guest.send(&packet);
        sent += 16 << 10;
        for update in guest.settled() {
            assert_eq!((update.op, update.room), (CREDIT_UPDATE, ROOM));
            told = update.read;
        }
    }
    let (mut other, _) = connected(&host, &mut guest);
    other.write_all(b"x").unwrap();
    assert_eq!(guest.receive().data, b"x");
    // The host reads: the guest hears of it.
    assert_eq!(read(&mut stream, sent as usize), vec![3; sent as usize]);
    while sent - told >= ROOM / 4 {
        let update = guest.receive();
        assert_eq!(update.op, CREDIT_UPDATE);
        told = update.read;
    }
    guest.send(&Packet::new(CREDIT_REQUEST, ports));
    let update = guest.receive();
    assert_eq!((update.op, update.read), (CREDIT_UPDATE, sent));
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_the_connection() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let listener = host.listen(99);
    let (mut stream, ports) = dialled(&listener, &mut guest);
    let mut packet = Packet::new(DATA, ports);
    packet.data = vec![3; 32 << 10];
    let mut sent = 0_usize;
    let answer = loop {
        guest.send(&packet);
        sent += packet.data.len();
        assert!(sent < 16 << 20, "somebody takes all of it");
        let answers = guest.settled();
        if let Some(other) = answers.into_iter().find(|a| a.op != CREDIT_UPDATE) {
            break other;
        }
    };
    assert_eq!(answer.op, RESET);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < sent);
}

#[test]
fn connections_are_limited_and_a_free_place_is_taken() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let listener = host.listen(99);
    let mut streams = Vec::new();
    for port in 0..256 {
        guest.send(&Packet::new(REQUEST, (port, 99)));
        assert_eq!(guest.receive().op, RESPONSE, "{port}");
        streams.push(listener.accept().unwrap());
    }
    guest.send(&Packet::new(REQUEST, (256, 99)));
    assert_eq!(guest.receive().op, RESET);
    let mut waiting = host.connect(52);
    guest.send(&Packet::new(RESET, (7, 99)));
    let request = guest.receive();
    assert_eq!((request.op, request.ports.1), (REQUEST, 52));
    guest.send(&Packet::new(RESPONSE, (52, request.ports.0)));
    assert_eq!(read(&mut waiting, 3), b"OK ");
}

#[test]
fn a_guest_without_room_is_not_served_and_loses_nothing() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    assert_eq!(guest.rings.set_up(VERSION_1), 0xf);
    // More refusals than wait at once: the guest's packets wait.
    for _ in 0..4 {
        guest.offer_strays();
        for _ in 0..16 {
            guest.rings.wait(TX);
        }
    }
    guest.offer_strays();
    assert_eq!(guest.settled(), []);
    assert_eq!(guest.rings.next(TX), None);
    guest.give_all_room();
    for _ in 0..5 * 16 {
        assert_eq!(guest.receive().op, RESET);
    }
    for _ in 0..16 {
        guest.rings.wait(TX);
    }
    assert_eq!(guest.settled(), []);
}

#[test]
fn a_reset_closes_connections_and_the_device_is_as_good_as_new() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let (mut stream, _) = connected(&host, &mut guest);
    guest.rings.driver.write(20, 1, 0);
    assert!(is_closed(&mut stream));
    guest.set_up(VERSION_1);
    connected(&host, &mut guest);
}

#[test]
fn a_guest_that_goes_on_elsewhere_hears_that_its_connections_are_gone() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX] {
        let (host, other) = (Host::new(), Host::new());
        let mut guest = Guest::new(&host.path());
        guest.set_up(features);
        let (mut stream, ports) = connected(&host, &mut guest);
        guest.rings.driver.device.worker().pause();
        stream.write_all(b"too late").unwrap();
        let generation = guest.rings.driver.read(21, 1);
        let mut guest = guest.moved(77, &other.path());
        assert!(is_closed(&mut stream));
        // The first thing that it hears, before it has run.
        assert_eq!(guest.rings.next(EVENT).map(|(_, length)| length), Some(4));
        assert_eq!(guest.rings.driver.read(0x2000, 8), 77);
        assert_ne!(guest.rings.driver.read(21, 1), generation);
        // Who comes before it was read waits: the guest would end it with the others.
        let mut early = other.connect(52);
        guest.send(&Packet::new(CREDIT_REQUEST, ports));
        let mut stale = Packet::new(CREDIT_REQUEST, ports);
        stale.cids = (77, 2);
        guest.send(&stale);
        assert_eq!(guest.settled(), []);
        guest.return_news();
        let mut packets = [guest.receive(), guest.receive()];
        packets.sort_by_key(|packet| packet.op);
        assert_eq!((packets[0].op, packets[0].cids), (REQUEST, (2, 77)));
        assert_ne!(
            packets[0].ports.0, ports.1,
            "the guest may still speak of that one"
        );
        assert_eq!(
            (packets[1].op, packets[1].ports),
            (RESET, (ports.1, ports.0))
        );
        let mut response = Packet::new(RESPONSE, (52, packets[0].ports.0));
        response.cids = (77, 2);
        guest.send(&response);
        assert_eq!(read(&mut early, 3), b"OK ");
    }
}

#[test]
fn a_machine_that_was_stopped_keeps_its_connections() {
    let host = Host::new();
    let mut guest = Guest::new(&host.path());
    let (mut stream, ports) = connected(&host, &mut guest);
    guest.rings.driver.device.worker().pause();
    stream.write_all(b"meanwhile").unwrap();
    assert_eq!(guest.rings.next(RX), None);
    guest.rings.driver.device.worker().resume();
    assert_eq!(guest.receive().data, b"meanwhile");
    let mut packet = Packet::new(DATA, ports);
    packet.data = b"on".to_vec();
    guest.send(&packet);
    assert_eq!(read(&mut stream, 2), b"on");
    assert_eq!(guest.rings.next(EVENT), None);
}

#[test]
fn state_of_another_device_is_refused() {
    let host = Host::new();
    let mut vsock = device(CID, &host.path());
    let state = vsock.save();
    let mut long = state.clone();
    long.push(0);
    assert!(
        vsock
            .restore(&long)
            .unwrap_err()
            .reason
            .contains("1 bytes too many")
    );
    assert!(vsock.restore(&state[..1]).is_err());
    let host = VsockState {
        cid: 2,
        generation: 0,
        last_port: 0,
    };
    let host = postcard::to_stdvec(&host).unwrap();
    let error = vsock.restore(&host).unwrap_err();
    assert!(error.reason.contains("the context id 2 is no guest's"));
    vsock.restore(&state).unwrap();
    assert_eq!(vsock.save(), state);
}
