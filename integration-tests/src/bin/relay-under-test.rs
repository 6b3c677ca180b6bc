//! `relay-under-test FROM TO`: an HTTP server of its own in front of an engine. Everything that comes to the UNIX
//! socket FROM goes to the UNIX socket TO and back, so that a test can kill the server and spare the worker behind it.

use tokio::net::{UnixListener, UnixStream};

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let mut paths = std::env::args().skip(1);
    let (Some(from), Some(to)) = (paths.next(), paths.next()) else {
        return Err(std::io::Error::other("call it with two paths"));
    };
    let listener = UnixListener::bind(&from)?;
    println!("relays {from} to {to}");
    loop {
        let (mut client, _) = listener.accept().await?;
        let to = to.clone();
        tokio::spawn(async move {
            let mut engine = UnixStream::connect(&to).await?;
            // A side that breaks ends both, as a server does.
            tokio::io::copy_bidirectional(&mut client, &mut engine).await
        });
    }
}
