// Package drill rehearses the loss of keys: [Restore] restores a snapshot of etcd into a throw-away
// etcd that only this process reaches, and [Open] decrypts its values with the keys that would be
// left, and counts what they decrypt. Nothing is written to any other etcd.
package drill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Config says what to restore, and with which programs.
type Config struct {
	// Etcd is the program etcd, and Etcdutl one that has `snapshot restore`: etcdutl, or an etcdctl
	// older than 3.6. Names without a slash are found in PATH.
	Etcd, Etcdutl string
	// Snapshot is the file to restore.
	Snapshot string
	// Folder is an empty folder that only the user of this process can enter. Its absolute path is
	// short enough for a unix socket in it. Restore fills it, and the caller removes it.
	Folder string
	// Ready returns nil once the etcd at an endpoint responds. It is called until then.
	Ready func(ctx context.Context, endpoint string) error
}

// Etcd is a running throw-away etcd.
type Etcd struct {
	// Endpoint is its only endpoint, a unix socket in the folder. It listens on no network.
	Endpoint string
	// Version is that of the program, and Tool that of the program that restored.
	Version, Tool string
	// Restored and Started are how long restoring the snapshot and starting etcd took.
	Restored, Started time.Duration

	process *process
}

const (
	memberName = "drill"
	// peerURL is one that nothing listens on: a single member has no peers.
	peerURL = "http://127.0.0.1:1"
	// Every etcd requires host:port in the URL of a unix socket, and takes both as the name of the
	// file, relative to its working directory: see findings/etcd-unix-socket-url.sh.
	clientSocket, peerSocket = "client.sock:0", "peer.sock:0"
	// maxSocketPath is the longest path of a unix socket on Linux, in bytes.
	maxSocketPath = 107

	stopWithin = 5 * time.Second
	readyPause = 20 * time.Millisecond
)

// ErrLongPath says that the path of the folder is too long for a unix socket in it.
var ErrLongPath = errors.New("the path of the folder is too long for a unix socket in it")

// ErrRestore says that Etcdutl did not restore the snapshot.
var ErrRestore = errors.New("restore the snapshot")

// Restore restores the snapshot and starts an etcd on the result. Both programs run without the
// variables of this process' environment, which they would take for settings. [Etcd.Close] must
// follow.
func Restore(ctx context.Context, c Config) (*Etcd, error) {
	folder, err := filepath.Abs(c.Folder)
	if err != nil {
		return nil, err
	}
	c.Folder = folder // the programs run in it, where a relative path would be that of another folder
	if len(filepath.Join(c.Folder, clientSocket)) > maxSocketPath {
		return nil, ErrLongPath
	}
	for _, program := range []*string{&c.Etcdutl, &c.Etcd} {
		path, err := exec.LookPath(*program)
		if err != nil {
			return nil, err
		}
		if *program, err = filepath.Abs(path); err != nil {
			return nil, err
		}
	}
	snapshot, err := filepath.Abs(c.Snapshot)
	if err != nil {
		return nil, err
	}
	e := &Etcd{Endpoint: "unix://" + filepath.Join(c.Folder, clientSocket)}
	e.Version = versionOf(ctx, c.Folder, c.Etcd, "--version")
	e.Tool = versionOf(ctx, c.Folder, c.Etcdutl, "version")
	data, begin := filepath.Join(c.Folder, "data"), time.Now()
	if err := run(ctx, c.Folder, c.Etcdutl, "snapshot", "restore", snapshot, "--data-dir", data,
		"--name", memberName, "--initial-cluster", memberName+"="+peerURL, "--initial-advertise-peer-urls", peerURL); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRestore, err)
	}
	if _, err := os.Stat(filepath.Join(data, "member")); err != nil { // etcd would start without any data
		return nil, fmt.Errorf("%w: %s made no data directory", ErrRestore, filepath.Base(c.Etcdutl))
	}
	e.Restored = time.Since(begin)
	begin = time.Now()
	e.process, err = start(c.Folder, c.Etcd, "--name", memberName, "--data-dir", data,
		"--listen-client-urls", "unix://"+clientSocket, "--advertise-client-urls", peerURL,
		"--listen-peer-urls", "unix://"+peerSocket, "--initial-advertise-peer-urls", peerURL, "--initial-cluster", memberName+"="+peerURL)
	if err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	if err := e.wait(ctx, c.Ready); err != nil {
		e.Close()
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	e.Started = time.Since(begin)
	return e, nil
}

// wait waits until etcd responds.
func (e *Etcd) wait(ctx context.Context, ready func(context.Context, string) error) error {
	for {
		limited, cancel := context.WithTimeout(ctx, stopWithin)
		stop := context.AfterFunc(e.process.ended, cancel)
		err := ready(limited, e.Endpoint)
		stop()
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-e.process.ended.Done():
			return e.process.why()
		case <-ctx.Done():
			return fmt.Errorf("it does not respond: %w", errors.Join(context.Cause(ctx), err))
		case <-time.After(readyPause):
		}
	}
}

// Close stops etcd. It may be called several times, also for nil.
func (e *Etcd) Close() {
	if e != nil && e.process != nil {
		e.process.stop(stopWithin)
	}
}

// environment is that of both programs. ETCD_… and ETCDCTL_… of this process are settings of the
// real etcd.
func environment(folder string) []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + folder, "TMPDIR=" + folder, "ETCDCTL_API=3"}
}

// command returns a command that has the folder as its working directory.
func command(ctx context.Context, folder, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // the operator names the program
	cmd.Dir, cmd.Env = folder, environment(folder)
	cmd.SysProcAttr = endWithParent()
	return cmd
}

// run runs a program to its end.
func run(ctx context.Context, folder, program string, args ...string) error {
	var out tail
	cmd := command(ctx, folder, program, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = stopWithin
	err := onOneThread(cmd.Run)
	if err == nil || ctx.Err() != nil {
		return errors.Join(ctx.Err(), err)
	}
	return out.explain(filepath.Base(program), err)
}

// versionOf returns the version that a program prints, or "".
func versionOf(ctx context.Context, folder, program, arg string) string {
	var out bytes.Buffer
	cmd := command(ctx, folder, program, arg)
	cmd.Stdout = &out
	if onOneThread(cmd.Run) != nil {
		return ""
	}
	line, _, _ := strings.Cut(out.String(), "\n") // "etcd Version: 3.7.3", "etcdutl version: 3.7.3"
	_, version, _ := strings.Cut(line, ":")
	return strings.TrimSpace(version)
}

// tail keeps the end of a program's output.
type tail struct{ kept []byte }

var _ io.Writer = (*tail)(nil)

const maxTail = 4096

// Write implements [io.Writer].
func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p...)
	if n := len(t.kept); n > maxTail {
		t.kept = append(t.kept[:0], t.kept[n-maxTail:]...)
	}
	return len(p), nil
}

// explain returns the error of a program that failed with err: its last line, if it has printed
// one.
func (t *tail) explain(name string, err error) error {
	text := strings.TrimSpace(string(t.kept))
	if at := strings.LastIndexByte(text, '\n'); at >= 0 {
		text = text[at+1:]
	}
	if text == "" {
		return fmt.Errorf("%s: %w", name, err)
	}
	return fmt.Errorf("%s: %w: %s", name, err, text)
}
