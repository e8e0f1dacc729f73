package command

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/encryption"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// auditWait is how long a command waits for another one that writes the log.
const auditWait = 5 * time.Second

// AuditPath returns the log of the commands next to that of a proxy: audit.commands.jsonl for
// audit.jsonl.
func AuditPath(path string) string { return encryption.AuditPath(path, "commands") }

// Record records in the log of the commands that a command began or ended. If audit.required is
// set, the error says that the command must not continue; otherwise a failure is a warning on
// stderr. It does nothing without an audit block.
func Record(c *config.Config, stderr io.Writer, r auditlog.Record) error {
	r.Event, r.User = auditlog.EventCommand, systemUser()
	err := record(c.Audit, r)
	switch {
	case err == nil:
		return nil
	case c.Audit.Required:
		return problem.New("commands write next to the proxy's own file, to "+AuditPath(c.Audit.Path),
			"%s cannot be recorded, and audit.required is set: %w", r.Command, err)
	}
	printable.Fprintf(stderr, "warning: %s is not in the audit log: %v\n", r.Command, err)
	return nil
}

// record writes one record to the log of the commands. It waits for another command that writes the
// log, and so opens the log for this record only.
func record(c *config.Audit, r auditlog.Record) error {
	if c == nil {
		return nil
	}
	own := *c
	own.Path = AuditPath(own.Path)
	deadline := time.Now().Add(auditWait)
	a, err := encryption.OpenAudit(&own, nil)
	for errors.Is(err, auditlog.ErrInUse) && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
		a, err = encryption.OpenAudit(&own, nil)
	}
	if err != nil {
		return err
	}
	a.Record(r)
	lost := a.Check()
	if n := a.Lost(); lost == nil && n > 0 {
		lost = errors.New(printable.Count(n, "record is", "records are") + " lost")
	}
	return errors.Join(lost, a.Close())
}

// LastTest returns when the log of the commands last recorded that an identity unwrapped a recovery
// copy for the recipients keyID of a provider of kind age. It returns the zero time if there is no
// such record, and prints a warning if the log cannot be read.
func LastTest(c *config.Config, stderr io.Writer, provider, keyID string) time.Time {
	if c.Audit == nil {
		return time.Time{}
	}
	at, err := auditlog.Last(AuditPath(c.Audit.Path), func(r auditlog.Record) bool {
		return r.Event == auditlog.EventCommand && r.Outcome == "ok" && r.Provider == provider && r.KeyID == keyID
	})
	if err != nil {
		printable.Fprintf(stderr, "warning: when the offline key %s was last tested is not known: %v\n", printable.Name(provider), err)
		return time.Time{}
	}
	return at
}

// CallLog records the KMS calls of a command, and its uses of recovery copies, in the log of the
// commands. A nil CallLog records nothing.
type CallLog struct {
	config *config.Audit
	stderr io.Writer

	mu     sync.Mutex
	failed bool
}

// NewCallLog returns the CallLog of a command, or nil without an audit block.
func NewCallLog(c *config.Config, stderr io.Writer) *CallLog {
	if c.Audit == nil {
		return nil
	}
	return &CallLog{config: c.Audit, stderr: stderr}
}

// Call records one attempt at a KMS.
func (l *CallLog) Call(c kmsclient.Call) { l.Record(encryption.CallRecord(c)) }

// Record records an event. The first failure is a warning and ends the recording: a command that
// only reads needs no log, and one that changes something has its own records.
func (l *CallLog) Record(r auditlog.Record) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed {
		return
	}
	if err := record(l.config, r); err != nil {
		l.failed = true
		printable.Fprintf(l.stderr, "warning: calls of the KMS and uses of recovery copies are not in the audit log: %v\n", err)
	}
}

// systemUser is the user who runs the command, and the one who became that user with sudo.
func systemUser() string {
	name := fmt.Sprintf("uid %d", os.Getuid())
	if u, err := user.Current(); err == nil && u.Username != "" {
		name = u.Username
	}
	if by := os.Getenv("SUDO_USER"); by != "" {
		name += " (sudo by " + by + ")"
	}
	return name
}
