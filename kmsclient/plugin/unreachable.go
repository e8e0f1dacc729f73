package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	kmsapi "k8s.io/kms/apis/v2"
)

const ownLog = "see the plugin's own log"

// dial connects to the plugin's socket and keeps the error, which gRPC hands on as text alone. No
// forward proxy is ever used.
func (k *KMS) dial(ctx context.Context, _ string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", k.address)
	if errors.Is(err, context.Canceled) {
		return nil, err // which says nothing of the socket
	}
	k.dialed.Store(&dialResult{err})
	return conn, err
}

// dialResult is how the last attempt to connect ended.
type dialResult struct{ err error }

// unavailable says why there is no answer, of a call that failed with the code Unavailable.
func (k *KMS) unavailable() string {
	if last := k.dialed.Load(); last != nil && last.err != nil {
		return unreachable(k.address, last.err)
	}
	return "the plugin says that it is unavailable, has closed the connection, or is no KMS plugin: " + ownLog
}

// unreachable says why a socket cannot be connected to, and what to do. address is a path, or @ and
// the name of an abstract socket.
func unreachable(address string, err error) string {
	if address[0] == '@' {
		return fmt.Sprintf("nothing listens on the abstract socket %q: start the plugin, on this host and in this network namespace, or correct plugin.endpoint", address)
	}
	info, serr := os.Stat(address)
	switch {
	case errors.Is(serr, fs.ErrNotExist):
		return fmt.Sprintf("there is no socket %q: start the plugin, or correct plugin.endpoint", address)
	case errors.Is(serr, fs.ErrPermission):
		return fmt.Sprintf("permission denied on the folder of the socket %q: let the proxy's user search it", address)
	case serr == nil && info.IsDir():
		return fmt.Sprintf("%q is a folder and not a socket: correct plugin.endpoint, or, if a container runtime has made it, remove it and start the plugin first", address)
	case serr == nil && info.Mode().IsRegular():
		return fmt.Sprintf("%q is a regular file and not a socket: correct plugin.endpoint", address)
	case serr == nil && info.Mode().Type() != fs.ModeSocket:
		return fmt.Sprintf("%q is not a socket: correct plugin.endpoint", address)
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return fmt.Sprintf("permission denied on the socket %q: let the proxy's user write to it", address)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Sprintf("nothing listens on the socket %q, which a plugin has left behind: start the plugin", address)
	case errors.Is(err, syscall.EPROTOTYPE):
		return fmt.Sprintf("the socket %q is of another kind than a plugin's: correct plugin.endpoint", address)
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return fmt.Sprintf("the socket %q cannot be connected to: %v", address, errno)
	}
	return fmt.Sprintf("the socket %q cannot be connected to in time", address)
}

// versionTimeout bounds the question which version of the KMS API a plugin serves.
const versionTimeout = time.Second

// unimplemented says what a plugin is that does not know a method of KMS v2.
func (k *KMS) unimplemented(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	// The API of KMS v1 is deprecated. Its Version takes and returns messages that those of Status
	// can replace.
	err := k.conn.Invoke(ctx, "/v1beta1.KeyManagementService/Version", &kmsapi.StatusRequest{}, &kmsapi.StatusResponse{})
	if err == nil {
		return "the plugin serves KMS v1 only: update it to one that serves KMS v2"
	}
	return "the plugin does not serve this method of KMS v2: " + ownLog
}
