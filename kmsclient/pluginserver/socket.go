package pluginserver

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/unixsocket"
)

// maxSocketPath is the kernel's limit, in bytes.
const maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

// ErrInUse is in the error of [Listen] when another process answers on the socket.
var ErrInUse = unixsocket.ErrInUse

// Listen makes a unix socket at /path or unix:///path that only the process' own user can connect
// to: its mode is 0600 from the start.
//
// It replaces an existing socket on which no process listens. Any other file there, and a socket in
// use ([ErrInUse]), is an error and stays as it is. Of several processes that start together one
// gets the socket. The listener's Close removes it, unless another process has replaced it.
func Listen(socket string) (net.Listener, error) {
	path, err := socketPath(socket)
	if err != nil {
		return nil, err
	}
	return unixsocket.Listen(path, 0o600)
}

// socketPath returns the absolute path in /path or unix:///path.
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
