package auditlog

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// Event is the kind of a record.
type Event string

// The events that callers record.
const (
	EventStart    Event = "start"    // the process began to serve
	EventStop     Event = "stop"     // the process ended, after a signal or a failure
	EventKMS      Event = "kms"      // one attempt of one operation of a KMS
	EventDenied   Event = "denied"   // an unauthorized client
	EventReload   Event = "reload"   // the configuration was read again
	EventRecovery Event = "recovery" // a seed was unwrapped from a recovery copy: Primary could not
	// EventGuard: rules that protect keys less than what the proxies agreed on: refused or allowed
	EventGuard   Event = "guard"
	EventBypass  Event = "bypass"  // plaintext was written under a rule, to etcd directly
	EventCommand Event = "command" // a command that works on etcd itself began or ended
)

// The events of the log itself.
const (
	eventLost Event = "lost" // records could not be written
	eventTorn Event = "torn" // a crash cut the line before
)

// Record is what a caller has to say. Fields that do not belong to its event stay empty. No field
// may hold a value, a key or a token; long texts are cut.
type Record struct {
	Event Event `json:"event"`
	// Time is when it happened; zero is now.
	Time time.Time `json:"-"`

	Provider string `json:"provider,omitempty"` // of kms and recovery
	// the provider whose key was not usable, of recovery
	Primary   string `json:"primary,omitempty"`
	Operation string `json:"operation,omitempty"` // as the KMS client calls it
	// of the KMS key, with its version where there is one
	KeyID     string        `json:"keyID,omitempty"`
	RequestID string        `json:"requestID,omitempty"` // to join with the KMS' own audit log
	Class     string        `json:"class,omitempty"`     // "ok", or the class of the error
	Latency   time.Duration `json:"-"`                   // of kms

	Listener string `json:"listener,omitempty"` // the address of the listener, as configured
	Client   string `json:"client,omitempty"`   // the name in its certificate
	Remote   string `json:"remote,omitempty"`   // its address

	Command string `json:"command,omitempty"` // of a command, as typed: "reencrypt"
	User    string `json:"user,omitempty"`    // who runs a command, as the system calls them
	Rule    string `json:"rule,omitempty"`    // a rule's prefix, of bypass
	// an etcd key or the prefix of several, of bypass and command
	Key string `json:"key,omitempty"`
	// Key where that is not valid UTF-8, which JSON texts cannot hold; set by [Log.Record]
	KeyBytes []byte `json:"keyBytes,omitempty"`
	Revision int64  `json:"revision,omitempty"` // of etcd, that wrote Key
	Keys     int64  `json:"keys,omitempty"`     // how many etcd keys, of command

	Trigger string `json:"trigger,omitempty"` // what made a reload
	// of a reload, a stop, a guard, or a command: "begun", "ok", "failed"
	Outcome string `json:"outcome,omitempty"`
	Reason  string `json:"reason,omitempty"`
	Version string `json:"version,omitempty"` // of the program, at a start
	Config  string `json:"config,omitempty"`  // SHA-256 of the configuration file, in hexadecimal
}

// Ended returns the record of the end of a process or command: failed with the reason err, or ok.
func (r Record) Ended(err error) Record {
	r.Outcome = "ok"
	if err != nil {
		r.Outcome, r.Reason = "failed", err.Error()
	}
	return r
}

// entry is a record as it is written, before its hash. Its field order is that of the line.
type entry struct {
	Seq  uint64 `json:"seq"`
	Time string `json:"time"`
	Record
	Microseconds *int64 `json:"latencyMicroseconds,omitempty"` // of kms, always

	Lost  uint64 `json:"lost,omitempty"`  // how many records
	Since string `json:"since,omitempty"` // when the first was lost

	TornBytes int64  `json:"tornBytes,omitempty"`
	TornHash  string `json:"tornHash,omitempty"`

	ChainKey     string `json:"chainKey,omitempty"`
	PreviousHash string `json:"previousHash,omitempty"` // of the first record of a file
	PreviousFile string `json:"previousFile,omitempty"` // the name that the file before got
}

// The bounds of texts, in bytes, so that no record comes near maxLine. JSON writes a byte as six at
// most.
const (
	maxText   = 1024
	maxReason = 4096
	maxLine   = 128 << 10
)

// newEntry makes the entry of r, with its texts cut to size.
func newEntry(r Record) entry {
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	if r.KeyBytes == nil && !utf8.ValidString(r.Key) {
		r.KeyBytes = []byte(r.Key)
	}
	r.KeyBytes = r.KeyBytes[:min(len(r.KeyBytes), maxText)]
	for _, s := range []*string{
		&r.Provider, &r.Primary, &r.Operation, &r.KeyID, &r.RequestID, &r.Class, &r.Command, &r.User, &r.Rule, &r.Key,
		&r.Listener, &r.Client, &r.Remote, &r.Trigger, &r.Outcome, &r.Version, &r.Config,
	} {
		*s = clip(*s, maxText)
	}
	r.Reason = clip(r.Reason, maxReason)
	e := entry{Time: stamp(r.Time), Record: r}
	if r.Event == EventKMS {
		us := r.Latency.Microseconds()
		e.Microseconds = &us
	}
	return e
}

func clip(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000000Z") }

// body is the line up to its hash.
func (e *entry) body() ([]byte, error) {
	text, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return text[:len(text)-1], nil // without the brace, which ends the line after the hash
}
