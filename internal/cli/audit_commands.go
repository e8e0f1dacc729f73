package cli

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
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// commandAuditWait is how long a command waits for another one that writes the log.
const commandAuditWait = 5 * time.Second

// openCommandAudit opens the log of the commands that work on etcd itself. The proxy on the same host has its own file: audit.log goes with audit.commands.log. It
// waits a little while another command writes it, so who works for long holds it open for no longer than it takes to record. It is nil without an audit block;
// close must follow.
func openCommandAudit(c *config.Config) (*auditor, error) {
	if c.Audit == nil {
		return nil, nil
	}
	own := *c.Audit
	own.Path = commandAuditPath(own.Path)
	for deadline := time.Now().Add(commandAuditWait); ; time.Sleep(20 * time.Millisecond) {
		a, err := newAuditor(&own, nil)
		if !errors.Is(err, auditlog.ErrInUse) || time.Now().After(deadline) {
			return a, err
		}
	}
}

// commandAuditPath is where commands record what the proxy with the log at path does not do.
func commandAuditPath(path string) string { return besideAudit(path, "commands") }

// recordCommand records in the commands' log that one began or ended, and lets the log go. With audit.required, the error says that it is not recorded, so that the
// command must not go on; otherwise w is told.
func recordCommand(c *config.Config, w io.Writer, r auditlog.Record) error {
	err := tryRecordCommand(c, r)
	switch {
	case err == nil:
		return nil
	case c.Audit.Required:
		return &failure{
			code: exitFailure, err: fmt.Errorf("%s is not recorded, and audit.required refuses to go on without it: %w", r.Command, err),
			hint: "commands write beside the proxy's own file, to " + commandAuditPath(c.Audit.Path),
		}
	}
	printf(w, "warning: %s is not in the audit log: %v\n", r.Command, err)
	return nil
}

func tryRecordCommand(c *config.Config, r auditlog.Record) error {
	r.Event, r.User = auditlog.EventCommand, commandUser()
	return recordBeside(c, r)
}

// recordBeside writes one record to the commands' log, if there is one.
func recordBeside(c *config.Config, r auditlog.Record) error {
	a, err := openCommandAudit(c)
	if a == nil || err != nil {
		return err
	}
	a.log.Record(r)
	lost := a.log.Check()
	if n := a.log.Lost(); lost == nil && n > 0 {
		lost = fmt.Errorf("%d records are lost", n)
	}
	return errors.Join(lost, a.log.Close())
}

// callLog records a command's calls of KMSs, and its uses of recovery copies, in the commands' log.
type callLog struct {
	config *config.Config
	stderr io.Writer

	mu     sync.Mutex
	warned bool
}

// newCallLog returns the one of a command, or nil without an audit block.
func newCallLog(c *config.Config, stderr io.Writer) *callLog {
	if c.Audit == nil {
		return nil
	}
	return &callLog{config: c, stderr: stderr}
}

// kmsCall is told of every attempt at a KMS.
func (l *callLog) kmsCall(c kmsclient.Call) { l.record(kmsRecord(c)) }

func (l *callLog) rescued(provider, by, keyID, why string) {
	l.record(rescueRecord(provider, by, keyID, why))
}

// record says once if it cannot: a command that only looks needs no log, and one that changes something has its own record of that.
func (l *callLog) record(r auditlog.Record) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.warned {
		return
	}
	if err := recordBeside(l.config, r); err != nil {
		l.warned = true
		printf(l.stderr, "warning: calls of the KMS and uses of recovery copies are not in the audit log: %v\n", err)
	}
}

// commandUser is who runs the command, as the system calls them, and who became them by sudo.
func commandUser() string {
	name := fmt.Sprintf("uid %d", os.Getuid())
	if u, err := user.Current(); err == nil && u.Username != "" {
		name = u.Username
	}
	if by := os.Getenv("SUDO_USER"); by != "" {
		name += " (sudo by " + by + ")"
	}
	return name
}
