//! A hub on this machine: enough of its API and its file store for a client, with faults on demand.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use flate2::{Compression, write::GzEncoder};
use serde_json::json;
use sha2::{Digest, Sha256};

/// The commit that `main` and `refs/pr/1` name.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The repository that exists.
pub(crate) const ID: &str = "black-forest-labs/FLUX.1-tiny";

/// A file of the repository.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) bytes: Vec<u8>,
    /// Kept in the file store (as large files are) and not in git.
    pub(crate) stored: bool,
}

/// What the hub does wrong.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "faults are independent")]
pub(crate) struct Faults {
    /// An answer to every request to the API or for a file: status, error code, message.
    pub(crate) refuse: Option<(u16, &'static str, &'static str)>,
    /// The same, for the bytes of files only; their facts are given.
    pub(crate) refuse_bytes: Option<(u16, &'static str, &'static str)>,
    /// Close the connection after so many bytes of a body, once per entry.
    pub(crate) cut: VecDeque<usize>,
    /// Answer ranges with the whole file.
    pub(crate) no_ranges: bool,
    /// Send other bytes than announced.
    pub(crate) garble: bool,
    /// Announce this size.
    pub(crate) claim: Option<u64>,
    /// Compress every body, whatever was asked for.
    pub(crate) gzip: bool,
    /// How the end of a body is told.
    pub(crate) framing: Framing,
    /// Answer HEAD with a relative redirection first, as for a renamed repository.
    pub(crate) renamed: bool,
}

/// How the end of a body is told.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Framing {
    /// By its length.
    #[default]
    Length,
    /// By an empty chunk.
    Chunked,
    /// By the end of the connection, as in HTTP/1.0.
    Close,
}

pub(crate) struct State {
    pub(crate) files: BTreeMap<String, Served>,
    pub(crate) faults: Faults,
    /// `METHOD /path [range] [auth]` of every request, in order.
    pub(crate) log: Vec<String>,
    /// The token of an account that has access.
    pub(crate) token: Option<&'static str>,
    store: String,
}

#[derive(Clone)]
pub(crate) struct Hub {
    state: Arc<Mutex<State>>,
    pub(crate) address: String,
}

impl Hub {
    pub(crate) fn start(files: &[(&str, Served)]) -> Self {
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let store = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", hub.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            files: files
                .iter()
                .map(|(path, file)| ((*path).to_owned(), file.clone()))
                .collect(),
            faults: Faults::default(),
            log: Vec::new(),
            token: None,
            store: format!("http://{}", store.local_addr().unwrap()),
        }));
        for listener in [hub, store] {
            let state = Arc::clone(&state);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = Arc::clone(&state);
                    thread::spawn(move || serve(&stream, &state));
                }
            });
        }
        Self { state, address }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// How many logged requests contain `part`; forgets them all.
    pub(crate) fn count(&self, part: &str) -> usize {
        let log = std::mem::take(&mut self.state().log);
        log.iter().filter(|line| line.contains(part)).count()
    }
}

#[derive(Default)]
struct Request {
    method: String,
    path: String,
    range: Option<(usize, Option<usize>)>,
    auth: Option<String>,
}

#[derive(Default)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
}

fn serve(stream: &TcpStream, state: &Mutex<State>) {
    let Some(request) = read(stream) else { return };
    let (mut answer, gzip, framing) = {
        let mut state = state.lock().unwrap();
        let answer = respond(&request, &mut state);
        (answer, state.faults.gzip, state.faults.framing)
    };
    if gzip {
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(&answer.body).unwrap();
        answer.body = packed.finish().unwrap();
        answer.headers.push(("Content-Encoding", "gzip".to_owned()));
    }
    let version = if framing == Framing::Close {
        "1.0"
    } else {
        "1.1"
    };
    let mut head = format!(
        "HTTP/{version} {} X\r\nConnection: close\r\n",
        answer.status
    );
    match framing {
        Framing::Length => {
            let _ = write!(head, "Content-Length: {}\r\n", answer.body.len());
        }
        Framing::Chunked => {
            head.push_str("Transfer-Encoding: chunked\r\n");
            let mut chunks = Vec::new();
            for chunk in answer.body.chunks(1000) {
                chunks.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                chunks.extend_from_slice(chunk);
                chunks.extend_from_slice(b"\r\n");
            }
            chunks.extend_from_slice(b"0\r\n\r\n");
            answer.body = chunks;
        }
        Framing::Close => {}
    }
    for (name, value) in &answer.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    head.push_str("\r\n");
    if request.method == "HEAD" {
        answer.body.clear();
    }
    let body = &answer.body[..answer.cut.unwrap_or(usize::MAX).min(answer.body.len())];
    let mut stream = stream;
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let mut request = Request {
        method: words.next()?.to_owned(),
        path: words.next()?.to_owned(),
        ..Request::default()
    };
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            return Some(request);
        }
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (from, to) = value.strip_prefix("bytes=")?.split_once('-')?;
                request.range = Some((from.parse().ok()?, to.parse().ok()));
            }
            "authorization" => request.auth = Some(value.to_owned()),
            _ => {}
        }
    }
    None
}

fn respond(request: &Request, state: &mut State) -> Answer {
    let mut line = format!("{} {}", request.method, request.path);
    if let Some((from, _)) = request.range {
        let _ = write!(line, " from {from}");
    }
    if request.auth.is_some() {
        line.push_str(" auth");
    }
    state.log.push(line);

    let path = request.path.split('?').next().unwrap();
    if let Some(path) = path.strip_prefix("/store/") {
        return body(path, request, state);
    }
    if let Some(refusal) = state.faults.refuse {
        return refuse(refusal);
    }
    if let Some(token) = state.token
        && request.auth.as_deref() != Some(&format!("Bearer {token}"))
    {
        return match request.auth {
            Some(_) => refuse((401, "", "Invalid credentials in Authorization header")),
            None => refuse((401, "", "Invalid username or password.")),
        };
    }
    let api = format!("/api/models/{ID}/");
    if let Some(rest) = path.strip_prefix(&api) {
        let (what, revision) = rest.split_once('/').unwrap();
        if ![COMMIT, "main", "refs%2Fpr%2F1"].contains(&revision) {
            return refuse((404, "RevisionNotFound", "Invalid rev id"));
        }
        return match what {
            "revision" => listing(state),
            _ => refuse((404, "", "")),
        };
    }
    match path.strip_prefix(&format!("/{ID}/resolve/{COMMIT}/")) {
        Some(file) if state.faults.renamed => Answer {
            status: 307,
            headers: vec![("Location", format!("/new/name/{file}"))],
            ..Answer::default()
        },
        Some(file) => resolve(file, request, state),
        None => match path.strip_prefix("/new/name/") {
            Some(file) => resolve(file, request, state),
            None => refuse((404, "RepoNotFound", "Repository not found")),
        },
    }
}

/// The repository's commit and files, with their sizes.
fn listing(state: &State) -> Answer {
    let files = state.files.iter();
    let files = files.map(|(path, file)| json!({"rfilename": path, "size": file.bytes.len()}));
    as_json(&json!({"id": ID, "sha": COMMIT, "siblings": files.collect::<Vec<_>>()}))
}

fn resolve(path: &str, request: &Request, state: &mut State) -> Answer {
    let Some(file) = state.files.get(path) else {
        return refuse((404, "EntryNotFound", "Entry not found"));
    };
    let size = state.faults.claim.unwrap_or(file.bytes.len() as u64);
    if !file.stored {
        let mut answer = body(path, request, state);
        let etag = format!("W/\"git{}\"", &sha256(path.as_bytes())[..37]);
        answer.headers.push(("ETag", etag));
        return answer;
    }
    let headers = vec![
        ("X-Linked-Etag", format!("\"{}\"", sha256(&file.bytes))),
        ("X-Linked-Size", size.to_string()),
        ("Location", format!("{}/store/{path}", state.store)),
    ];
    Answer {
        status: 302,
        headers,
        ..Answer::default()
    }
}

fn body(path: &str, request: &Request, state: &mut State) -> Answer {
    if let Some(refusal) = state.faults.refuse_bytes
        && request.method == "GET"
    {
        return refuse(refusal);
    }
    let mut bytes = state.files[path].bytes.clone();
    if state.faults.garble {
        bytes[0] ^= 1;
    }
    let mut answer = Answer {
        status: 200,
        ..Answer::default()
    };
    if let Some((from, _)) = request.range.filter(|_| !state.faults.no_ranges) {
        if from >= bytes.len() {
            return refuse((416, "", ""));
        }
        answer.status = 206;
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        answer.headers.push(("Content-Range", range));
        bytes.drain(..from);
    }
    answer.body = bytes;
    if request.method == "GET" {
        answer.cut = state.faults.cut.pop_front();
    }
    answer
}

fn as_json(value: &impl serde::Serialize) -> Answer {
    Answer {
        status: 200,
        headers: vec![("Content-Type", "application/json".to_owned())],
        body: serde_json::to_vec(value).unwrap(),
        cut: None,
    }
}

fn refuse((status, code, message): (u16, &str, &str)) -> Answer {
    let mut headers = vec![("Retry-After", "7".to_owned())];
    if !code.is_empty() {
        headers.push(("X-Error-Code", code.to_owned()));
    }
    Answer {
        status,
        headers,
        body: serde_json::to_vec(&json!({ "error": message })).unwrap(),
        cut: None,
    }
}

/// An address where nobody listens.
pub(crate) fn nobody() -> String {
    "http://127.0.0.1:1".to_owned() // never given to a listener that asks for any port
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |mut s, b| {
            let _ = write!(s, "{b:02x}");
            s
        })
}
