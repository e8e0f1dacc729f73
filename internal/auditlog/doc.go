// Package auditlog writes and verifies a tamper-evident log.
//
// A log is a file of JSON lines, in which each record is chained to the one before:
//
//	{"seq":7,"time":"2026-01-02T03:04:05.000000006Z","event":"kms", … ,"hash":"<64 hexadecimal digits>"}
//	└──────────────────────── body ────────────────────────────────┘
//
//	hash = SHA-256(P ‖ body)            of a log without a key
//	hash = HMAC-SHA-256(key, P ‖ body)  of a log with one
//
// body is every byte of the line before `,"hash":"`. P is the hash of the record before, as 32
// bytes; before record 1 they are zero. Seq counts from 1 without a gap. Every record of a log with
// a key has the field chainKey, which identifies the key: the first 8 bytes of HMAC-SHA-256(key,
// "etcd-kms-proxy audit chain key").
//
// The chain continues across files: the first record of each file, except record 1, has P in its
// field previousHash, so that a file can be checked alone, and also against the one before.
//
// A crash may leave a line that is cut short. It stays where it is; the next record, of event
// "torn", has the size and the SHA-256 of all bytes between the last whole record and itself,
// without the line break that the log added to them. So the chain covers them too.
//
// What a chain cannot show is that its end is missing: a log whose last records were removed is a
// shorter log. The last hash, kept elsewhere, shows it. And anyone who may write the file of a log
// without a key can rewrite it from any record on.
//
// The package knows nothing of the configuration, KMS keys or etcd. Servers and commands write logs
// (internal/server, internal/encryption, internal/cli), and `audit verify` checks them.
package auditlog
