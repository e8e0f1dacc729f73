// Package unixsocket makes listening unix sockets that have their permissions from the start: there
// is no moment between bind and chmod in which other users can connect. The listeners of the proxy
// and the KMS plugin server use it. It does not know what is served.
package unixsocket

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// probeTimeout limits how long a process that serves the socket may take to accept. Five of it
// limit how long another process may take to place its own.
const probeTimeout = time.Second

// ErrInUse is in the error of [Listen] when another process serves the socket.
var ErrInUse = fmt.Errorf("another process answers on it: %w", syscall.EADDRINUSE)

// ErrNoFolder is in the error of [Listen] when the folder of the socket does not exist.
var ErrNoFolder = errors.New("does not exist")

// Listen makes a unix socket at path, which is absolute. It has mode from the start, independently
// of the process' umask.
//
// An existing socket is replaced if no process accepts connections on it. A socket in use
// ([ErrInUse]), and any other existing file, is an error and stays unchanged. If several processes
// start at the same time, one of them gets the socket. The listener's Close removes it, unless
// another process has replaced it.
func Listen(path string, mode fs.FileMode) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("socket path %q: must be absolute", path)
	}
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("socket %s: its folder %s %w", path, dir, ErrNoFolder)
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	defer unlock()
	if err := checkVacant(path); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l, err := bind(path, mode)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

// checkVacant returns an error unless a socket can be placed at path: there is no file, or a socket
// on which no process accepts connections.
func checkVacant(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("see what is there: %w", err)
	case info.Mode()&fs.ModeSocket == 0:
		return errors.New("there is something that is not a socket; it is left alone: remove it, or choose another path")
	}
	conn, err := net.DialTimeout("unix", path, probeTimeout)
	switch {
	case err == nil:
		_ = conn.Close()
		return ErrInUse
	case errors.Is(err, syscall.EAGAIN), os.IsTimeout(err): // it listens, but its queue is full
		return ErrInUse
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("see whether it is in use: %w", err)
}

// bind binds a socket in a folder that other users cannot enter, gives it its mode and moves it
// to path. So at no time another user can open it, and a client finds either the old socket or the
// new one.
func bind(path string, mode fs.FileMode) (_ net.Listener, err error) {
	// As short as can be: a folder that leaves room for the socket's own name should leave room for
	// this.
	private := filepath.Join(filepath.Dir(path), ".k"+rand.Text()[:4])
	if err := os.Mkdir(private, 0o700); err != nil {
		return nil, fmt.Errorf("make a folder in %s to bind it in: %w", filepath.Dir(path), withoutPath(err))
	}
	inner := filepath.Join(private, "s")
	defer func() {
		if err != nil {
			_ = os.Remove(inner)
		}
		_ = os.Remove(private)
	}()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: inner, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("bind: %w", withoutPath(err))
	}
	l.SetUnlinkOnClose(false)
	defer func() {
		if err != nil {
			_ = l.Close()
		}
	}()
	if err := os.Chmod(inner, mode); err != nil {
		return nil, fmt.Errorf("set its mode: %w", withoutPath(err))
	}
	own, err := os.Lstat(inner)
	if err != nil {
		return nil, fmt.Errorf("check it: %w", withoutPath(err))
	}
	if err := os.Rename(inner, path); err != nil {
		return nil, fmt.Errorf("put it in its place: %w", withoutPath(err))
	}
	return &socketListener{UnixListener: l, path: path, own: own}, nil
}

// withoutPath returns the cause of a failed operation on a file, without the name that the socket
// has for a moment only.
func withoutPath(err error) error { return cmp.Or(errors.Unwrap(err), err) }

// socketListener removes its socket when it closes.
type socketListener struct {
	*net.UnixListener
	path string
	own  fs.FileInfo
	once sync.Once
}

// Addr is the socket's path; the one it was bound under is gone.
func (l *socketListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close stops listening and removes the socket. It may be called more than once.
func (l *socketListener) Close() error {
	l.once.Do(func() {
		// a successor may be just about to put its own there
		unlock, err := lockDir(filepath.Dir(l.path))
		if err == nil {
			defer unlock()
		}
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.own) {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}
