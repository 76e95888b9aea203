//! Rules about the language of comments, documents and messages (`CONTRIBUTING.md`, Text).
//!
//! A small lexer splits the sources into code, comments and string literals. It covers only the
//! part of Rust's syntax that this requires.

use std::path::{Path, PathBuf};

use super::{check, files, has_extension, read};

/// Words and phrases that made earlier text hard to read, and their replacements. Case is ignored.
/// Text in backquotes is exempt.
const AVOIDED: [(&str, &str); 53] = [
    ("answer", "response, respond"),
    ("answered", "responded, returned"),
    ("answering", "responding"),
    ("answers", "responses, responds"),
    ("anew", "again, from the start"),
    ("anybody", "any task, any client"),
    ("at once", "immediately, concurrently, together"),
    ("became of", "happened to"),
    ("become of", "happen to"),
    ("becomes of", "happens to"),
    ("behind", "after, following, trailing, inside"),
    ("beside", "next to, concurrently with, in addition to"),
    ("came to", "resulted in"),
    ("come to", "result in"),
    ("comes to", "results in"),
    ("everybody", "all tasks, every connection"),
    ("gave up", "stopped, abandoned"),
    ("give up", "stop, abandon"),
    ("given up", "cancelled, abandoned"),
    ("gives up", "stops, abandons"),
    ("giving up", "stopping, abandoning"),
    ("go before", "take precedence over"),
    ("go on", "continue"),
    ("goes before", "takes precedence over"),
    ("goes on", "continues"),
    ("going on", "continuing, in progress"),
    ("in place of", "instead of"),
    ("look at", "check, inspect, read"),
    ("looked at", "checked, inspected, read"),
    ("looking at", "checking, inspecting, reading"),
    ("looks at", "checks, inspects, reads"),
    ("nobody", "no task, no client, nothing"),
    ("of its own", "its own, a separate"),
    ("of their own", "their own, separate"),
    ("said", "stated, reported"),
    ("say", "state, report, contain"),
    ("saying", "stating, reporting"),
    ("says", "states, reports, contains"),
    ("somebody", "a task, a client"),
    ("stand", "be, be present"),
    ("standing", "being, present"),
    ("stands", "is, is present, represents"),
    ("stood", "was, was present"),
    ("tell", "report, indicate, distinguish"),
    ("telling", "reporting, indicating"),
    ("tells", "reports, indicates, specifies"),
    ("told", "reported, notified, specified"),
    ("went before", "took precedence over"),
    ("went on", "continued"),
    ("what becomes", "what happens"),
    ("whatever", "any, regardless of"),
    ("whoever", "the caller, the peer"),
    ("whomever", "the caller, the peer"),
];

/// Longest line of a comment, as `CONTRIBUTING.md` has it.
const COMMENT_COLUMNS_MAX: usize = 100;

/// Names in the JSON report of `ringside-bench soak`. Scripts read them, so they must not change.
const KEPT: [&str; 2] = ["\"behind the end\"", "\"within the answer\""];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Comment,
    Text,
}

/// A comment line or a string literal, with the number of its first line.
#[derive(Debug, PartialEq, Eq)]
struct Prose<'a> {
    part: Part,
    line: usize,
    text: &'a str,
}

/// Returns the length of the raw string literal at the start of `rest`, including its prefix.
fn raw_string(rest: &str) -> Option<usize> {
    let open = rest
        .strip_prefix("br")
        .or_else(|| rest.strip_prefix("cr"))
        .or_else(|| rest.strip_prefix('r'))?;
    let hashes = open.len() - open.trim_start_matches('#').len();
    let body = open[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", &open[..hashes]);
    let len = body.find(&end)? + end.len();
    Some(rest.len() - body.len() + len)
}

/// Returns the length of the string literal at the start of `rest`.
fn string(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix('"')?;
    let mut escaped = false;
    let end = body.bytes().position(|byte| {
        let closes = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        closes
    })?;
    Some(end + 2)
}

/// Returns the length of the character literal at the start of `rest`, or `None` for a lifetime.
fn character(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix('\'')?;
    let mut chars = body.char_indices();
    let (_, first) = chars.next()?;
    if first == '\\' {
        let (at, _) = chars.nth(1)?;
        return Some(1 + at + body[at..].find('\'')? + 1);
    }
    let (at, next) = chars.next()?;
    (next == '\'').then_some(1 + at + 1)
}

/// Returns the line comments and the string literals of a source file. Block comments are skipped
/// because the sources have none, and byte strings because they are protocol data.
fn prose(source: &str) -> Vec<Prose<'_>> {
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    let mut after_name = false;
    while let Some(next) = source[at..].chars().next() {
        let rest = &source[at..];
        let mut part = None;
        let len = if rest.starts_with("//") {
            part = Some(Part::Comment);
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(len) = raw_string(rest).filter(|_| !after_name) {
            part = rest.starts_with('r').then_some(Part::Text);
            len
        } else if let Some(len) = string(rest) {
            part = Some(Part::Text);
            len
        } else if let Some(len) = rest
            .strip_prefix('b')
            .filter(|_| !after_name)
            .and_then(string)
        {
            len + 1
        } else {
            character(rest).unwrap_or(next.len_utf8())
        };
        let text = &rest[..len];
        found.extend(part.map(|part| Prose { part, line, text }));
        after_name = next.is_alphanumeric() || next == '_';
        line += text.matches('\n').count();
        at += len;
    }
    found
}

/// Returns the words of a line in lower case, without punctuation and without text in backquotes.
fn words(text: &str) -> Vec<String> {
    let plain: String = text.split('`').step_by(2).collect::<Vec<_>>().join(" x ");
    let is_inside = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '/' | '.' | '\'');
    plain
        .split(|c| !is_inside(c))
        .map(|word| word.trim_matches(['.', '\'', '/']))
        .map(|word| word.strip_suffix("'s").unwrap_or(word).to_lowercase())
        .filter(|word| !word.is_empty())
        .collect()
}

/// Returns the avoided words and phrases in consecutive lines, each with the number of the line it
/// starts on. A phrase may continue on the next line.
fn avoided(lines: &[(usize, &str)]) -> Vec<(usize, &'static str, &'static str)> {
    let mut text: Vec<(usize, String)> = Vec::new();
    for (line, part) in lines {
        text.extend(words(part).into_iter().map(|word| (*line, word)));
    }
    let mut found = Vec::new();
    for (nth, (line, _)) in text.iter().enumerate() {
        for (phrase, instead) in AVOIDED {
            let mut wanted = phrase.split(' ');
            let rest = text[nth..].iter();
            let matches = rest
                .zip(wanted.by_ref())
                .all(|((_, word), wanted)| word == wanted);
            let is_whole = text.len() - nth >= phrase.split(' ').count();
            if matches && is_whole {
                found.push((*line, phrase, instead));
            }
        }
    }
    found
}

/// Returns the prose in a line. In a document, this is everything except indented commands; in a
/// script or a manifest, it is the comment.
fn readable<'a>(path: &Path, line: &'a str) -> &'a str {
    if has_extension(path, &["md"]) {
        return if line.starts_with("    ") { "" } else { line };
    }
    line.find("# ").map_or("", |at| &line[at..])
}

/// Returns whether a file is a document, a script or a manifest.
fn is_plain_text(path: &Path) -> bool {
    let scripts = [".ci/run", "fuzz/run"];
    has_extension(path, &["md", "py", "sh", "toml", "yaml", "yml"])
        || scripts.iter().any(|script| path.ends_with(script))
}

/// Returns whether the string literals of a file are messages to users. Those of tests are mostly
/// data.
fn has_messages(path: &Path) -> bool {
    let name = path.to_string_lossy();
    let is_test = name.contains("/tests/") || name.contains("tests.rs") || name.contains("/sim_");
    (path.starts_with("src") || path.starts_with("tools")) && !is_test
}

fn prose_files() -> Vec<PathBuf> {
    let mut paths = files("");
    paths.retain(|path| has_extension(path, &["rs"]) || is_plain_text(path));
    // The list itself.
    paths.retain(|path| !path.ends_with("tests/tidy/prose.rs"));
    paths
}

#[test]
fn text_avoids_private_idiom() {
    let mut offences = Vec::new();
    for path in prose_files() {
        let text = read(&path);
        let mut found = Vec::new();
        if has_extension(&path, &["rs"]) {
            let prose = prose(&text);
            let comments = prose.iter().filter(|prose| prose.part == Part::Comment);
            let comments: Vec<_> = comments.map(|prose| (prose.line, prose.text)).collect();
            for block in comments.chunk_by(|(one, _), (next, _)| one + 1 == *next) {
                found.extend(avoided(block));
            }
            let messages = prose.iter().filter(|prose| {
                let is_text = prose.part == Part::Text && prose.text.contains(' ');
                is_text && has_messages(&path) && !KEPT.contains(&prose.text)
            });
            found.extend(messages.flat_map(|prose| avoided(&[(prose.line, prose.text)])));
        } else {
            let lines = text.lines().enumerate();
            let lines = lines.map(|(nth, line)| (nth + 1, readable(&path, line)));
            found.extend(avoided(&lines.collect::<Vec<_>>()));
        }
        for (line, word, instead) in found {
            let path = path.display();
            offences.push(format!("{path}:{line}: \"{word}\"; better: {instead}"));
        }
    }
    check(&offences);
}

#[test]
fn comments_do_not_begin_with_what() {
    let mut offences = Vec::new();
    for path in files("") {
        if !has_extension(&path, &["rs"]) {
            continue;
        }
        for prose in prose(&read(&path)) {
            let text = prose.text.trim_start_matches(['/', '!']).trim_start();
            if prose.part == Part::Comment && text.starts_with("What ") {
                let (path, line) = (path.display(), prose.line);
                offences.push(format!(
                    "{path}:{line}: a comment line begins with \"What\""
                ));
            }
        }
    }
    check(&offences);
}

#[test]
fn comments_fit_in_their_columns() {
    let mut offences = Vec::new();
    for path in files("") {
        if !has_extension(&path, &["rs"]) {
            continue;
        }
        for (nth, line) in read(&path).lines().enumerate() {
            let columns = line.chars().count();
            if line.trim_start().starts_with("//") && columns > COMMENT_COLUMNS_MAX {
                let (path, line) = (path.display(), nth + 1);
                offences.push(format!(
                    "{path}:{line}: {columns} columns, rustfmt wraps no comment"
                ));
            }
        }
    }
    check(&offences);
}

/// Returns the anchor that Git hosts generate for a heading: lower case, hyphens for spaces, no
/// punctuation.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = heading.chars().filter_map(|c| match c {
        ' ' => Some('-'),
        '-' | '_' => Some(c),
        _ => c.is_alphanumeric().then_some(c),
    });
    kept.collect()
}

/// Returns the links into `docs/` in a line: `docs/FILE.md` or `docs/FILE.md#anchor`.
fn references(line: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    line.match_indices("docs/").filter_map(|(at, _)| {
        let rest = &line[at..];
        let len = rest.find(".md")? + ".md".len();
        let (file, rest) = rest.split_at(len);
        if file.contains(|c: char| c.is_whitespace() || c == '`') {
            return None;
        }
        let anchor = rest.strip_prefix('#').map(|rest| {
            let is_end = |c: char| !c.is_alphanumeric() && c != '-' && c != '_';
            &rest[..rest.find(is_end).unwrap_or(rest.len())]
        });
        Some((file, anchor))
    })
}

#[test]
fn links_into_the_documents_resolve() {
    let mut offences = Vec::new();
    for path in prose_files() {
        for (nth, line) in read(&path).lines().enumerate() {
            let at = format!("{}:{}", path.display(), nth + 1);
            for (file, wanted) in references(line) {
                let Ok(text) = std::fs::read_to_string(super::root().join(file)) else {
                    offences.push(format!("{at}: no file {file}"));
                    continue;
                };
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                if let Some(wanted) = wanted
                    && !headings.any(|heading| anchor(heading) == wanted)
                {
                    offences.push(format!("{at}: no heading #{wanted} in {file}"));
                }
            }
            // Notes outside the repository, cited as "reference 6.3" or "design 4.1".
            let words = words(line);
            let mut pairs = words.windows(2);
            let is_numbered = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
            if pairs
                .any(|pair| matches!(&*pair[0], "reference" | "design") && is_numbered(&pair[1]))
            {
                offences.push(format!(
                    "{at}: a numbered reference to a text outside the repository"
                ));
            }
        }
    }
    check(&offences);
}

#[test]
fn comments_and_strings_are_distinguished_from_code() {
    let source = "//! One.\nlet a = \"two \\\" // no\"; // three\nlet b = r#\"four \"x\"\"#;\n\
                  let c = '\"'; let d: &'static str = b\"five\"; let e = '\\''; /* six */ bar\"\";\n";
    let found: Vec<_> = prose(source)
        .into_iter()
        .map(|prose| (prose.part, prose.line, prose.text))
        .collect();
    let want = [
        (Part::Comment, 1, "//! One."),
        (Part::Text, 2, "\"two \\\" // no\""),
        (Part::Comment, 2, "// three"),
        (Part::Text, 3, "r#\"four \"x\"\"#"),
        (Part::Text, 4, "\"\""),
    ];
    assert_eq!(found, want);
    let lines = [
        (7, "// It is `told` max-tell. It goes"),
        (8, "// on; Told's."),
    ];
    let found: Vec<_> = avoided(&lines)
        .into_iter()
        .map(|(line, word, _)| (line, word))
        .collect();
    assert_eq!(found, [(7, "goes on"), (8, "told")]);
    assert_eq!(anchor("### Shared storage (v1)"), "shared-storage-v1");
    let line = "see docs/a.md and `docs/b.md#c-d`, docs/ or x.md";
    let found: Vec<_> = references(line).collect();
    assert_eq!(found, [("docs/a.md", None), ("docs/b.md", Some("c-d"))]);
}
