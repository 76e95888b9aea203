//! An engine that sends the chunks of a stream one by one, on command.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::client::{Stream, position};

/// Returns one chunk with an event of 200 bytes.
pub(crate) fn chunk() -> String {
    let event = format!("data: {}\n\n", "x".repeat(192));
    format!("{:x}\r\n{event}\r\n", event.len())
}

/// A command to the open stream.
enum Command {
    SendChunk,
    End,
}

/// The engine. Its threads end with the process.
pub(crate) struct ChunkEngine {
    port: u16,
    commands: Sender<Command>,
}

impl ChunkEngine {
    /// Starts the engine on a free port, with TLS if `tls` is set.
    pub(crate) fn start(tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (commands, received) = channel();
        let received = Arc::new(Mutex::new(received));
        thread::spawn(move || {
            for socket in listener.incoming() {
                let (socket, tls) = (socket.unwrap(), tls.clone());
                let commands = Arc::clone(&received);
                thread::spawn(move || serve(socket, tls, &commands));
            }
        });
        Self { port, commands }
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    /// Sends one chunk on the open stream, of which there must be one.
    pub(crate) fn send_one(&self) {
        self.commands.send(Command::SendChunk).unwrap();
    }

    /// Ends the open stream and closes its connection.
    pub(crate) fn end_stream(&self) {
        self.commands.send(Command::End).unwrap();
    }
}

fn serve(socket: TcpStream, tls: Option<Arc<ServerConfig>>, commands: &Mutex<Receiver<Command>>) {
    socket.set_nodelay(true).unwrap();
    let stream: Box<dyn Stream> = match tls {
        None => Box::new(socket),
        Some(tls) => Box::new(StreamOwned::new(
            ServerConnection::new(tls).unwrap(),
            socket,
        )),
    };
    // A connection without a request ends with an error.
    let _ = stream_chunks(stream, commands);
}

fn stream_chunks(
    mut stream: Box<dyn Stream>,
    commands: &Mutex<Receiver<Command>>,
) -> std::io::Result<()> {
    let (mut request, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    while position(&request, b"\"}").is_none() {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..count]);
    }
    stream.write_all(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
          transfer-encoding: chunked\r\n\r\n",
    )?;
    stream.flush()?;
    let chunk = chunk();
    let commands = commands.lock().unwrap();
    while matches!(commands.recv(), Ok(Command::SendChunk)) {
        stream.write_all(chunk.as_bytes())?;
        stream.flush()?;
    }
    Ok(())
}
