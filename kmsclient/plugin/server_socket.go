package plugin

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// probeTimeout bounds how long a process that holds the socket may take to accept, and how long another one may be at placing its own.
const probeTimeout = time.Second

// maxSocketPath is what the kernel takes, in bytes.
const maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

// ErrInUse is in the error of [Listen] when another process answers on the socket.
var ErrInUse = errors.New("another process answers on it")

// Listen makes a unix socket at /path or unix:///path that only the process' own user can connect to: mode 0600, from the first moment on.
//
// A socket that stands there is replaced if nobody answers on it. Anything else that stands there, and a socket that is in use
// ([ErrInUse]), is an error and stays as it is. Of several processes that start together one gets the socket. The listener's Close removes
// it, unless another process has put its own there since.
func Listen(socket string) (net.Listener, error) {
	path, err := socketPath(socket)
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	unlock, err := lockDir(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("socket %s: its folder %s does not exist: %w", path, dir, fs.ErrNotExist)
		}
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	defer unlock()
	if err := vacant(path); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l, err := place(path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

// socketPath returns the absolute path that the two forms of a socket's name stand for.
func socketPath(socket string) (string, error) {
	path := strings.TrimPrefix(socket, "unix://")
	switch {
	case !strings.HasPrefix(path, "/") || strings.HasPrefix(path, "/@"):
		// An abstract socket has no mode: every process of the machine could connect.
		return "", fmt.Errorf("socket %q: must be /path/to/socket or unix:///path/to/socket", socket)
	case strings.ContainsAny(path, "%?#\x00"):
		return "", fmt.Errorf("socket %q: %%, ? and # mean something else in the endpoint of an API server's configuration", socket)
	case path != filepath.Clean(path):
		return "", fmt.Errorf("socket %q: write the plain path %s", socket, filepath.Clean(path))
	case len(path) > maxSocketPath:
		return "", fmt.Errorf("socket %q: the path has %d bytes; the limit is %d", socket, len(path), maxSocketPath)
	}
	return path, nil
}

// vacant returns an error unless a socket can be placed at path: nothing is there, or a socket that nobody answers on.
func vacant(path string) error {
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

// place binds a socket within a folder that nobody else may enter, gives it its mode and moves it to path. So at no time a stranger can open
// it, and a client finds either the old socket or the new one.
func place(path string) (_ net.Listener, err error) {
	var random [2]byte
	_, _ = rand.Read(random[:]) // never fails
	// As short as can be: a folder that leaves room for the socket's own name should leave room for this.
	private := filepath.Join(filepath.Dir(path), ".k"+hex.EncodeToString(random[:]))
	if err := os.Mkdir(private, 0o700); err != nil {
		return nil, fmt.Errorf("make a folder to bind it in: %w", err)
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
		return nil, fmt.Errorf("bind: %w", err)
	}
	l.SetUnlinkOnClose(false)
	defer func() {
		if err != nil {
			_ = l.Close()
		}
	}()
	if err := os.Chmod(inner, 0o600); err != nil {
		return nil, fmt.Errorf("set its mode: %w", err)
	}
	own, err := os.Lstat(inner)
	if err != nil {
		return nil, fmt.Errorf("look at it: %w", err)
	}
	if err := os.Rename(inner, path); err != nil {
		return nil, fmt.Errorf("put it in its place: %w", err)
	}
	return &socketListener{UnixListener: l, path: path, own: own}, nil
}

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
		unlock, err := lockDir(filepath.Dir(l.path)) // a successor may be just about to put its own there
		if err == nil {
			defer unlock()
		}
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.own) {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}
