package integration

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/config"
	"go.uber.org/zap"
)

// overhead is what sealing adds to a request, at most: some 170 bytes for each put of a transaction.
const overhead = 128 << 10

// withRoom raises the limit on requests as an operator does who puts the proxy before an etcd.
func withRoom(c config.ServerConfig) config.ServerConfig {
	c.MaxRequestBytes += overhead
	return c
}

// front puts a proxy that seals every key between the member's clients and its gRPC server: what connects to the member's listener
// is handed to the proxy, and the proxy connects to the listener that is returned. Closing that one ends the proxy as a
// supervisor does.
func (m *Member) front() net.Listener {
	f, err := m.newFront()
	if err != nil {
		m.Logger.Panic("put the proxy before the member", zap.Error(err))
	}
	return f
}

type memberFront struct {
	net.Listener // the proxy connects to it

	clients net.Listener
	dir     string
	proxy   *exec.Cmd
	ended   chan struct{}
	once    sync.Once
	closing atomic.Bool
}

func (m *Member) newFront() (*memberFront, error) {
	dir, err := os.MkdirTemp("", "front")
	if err != nil {
		return nil, err
	}
	f := &memberFront{dir: dir, clients: m.GRPCListener, ended: make(chan struct{})}
	if f.Listener, err = net.Listen("unix", filepath.Join(dir, "etcd.sock")); err != nil {
		return nil, err
	}
	address := filepath.Join(dir, "proxy.sock")
	listener := ""
	if i := m.ClientTLSInfo; i != nil {
		var ciphers []string
		for _, c := range i.CipherSuites {
			ciphers = append(ciphers, tls.CipherSuiteName(c))
		}
		listener = fmt.Sprintf("  tls: {certFile: %s, keyFile: %s, clientCAFile: %s, clientCRLFile: %q, cipherSuites: [%s]}\n", absolute(i.CertFile), absolute(i.KeyFile),
			absolute(i.TrustedCAFile), absolute(i.CRLFile), strings.Join(ciphers, ", "))
	}
	text := fmt.Sprintf(`apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
- address: unix://%s
%setcd:
  endpoints: [unix://%s]
  maxRequestBytes: %d
kms:
- name: test
  local: {keyFile: %s}
rules:
- {prefix: "", writeWith: test}
coordination: {enabled: false}
log: {level: warn}
`, address, listener, filepath.Join(dir, "etcd.sock"), m.MaxRequestBytes, os.Getenv("SCOREBOARD_KEY"))
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	// Where the test has turned authentication on, nobody may read what proxies agreed on, which this one has no part in.
	f.proxy = exec.Command(os.Getenv("SCOREBOARD_PROXY"), "serve", "--config", file, "--allow-weakening")
	f.proxy.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	f.proxy.Env = append(os.Environ(), "GOMAXPROCS=2")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	f.proxy.Stdout, f.proxy.Stderr = log, log
	if err := f.proxy.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = f.proxy.Wait()
		log.Close()
		close(f.ended)
	}()
	// The member does not wait for its proxy: its peers would wait for it.
	go func() {
		if f.serving(address) {
			f.accept(address)
			return
		}
		if said, _ := os.ReadFile(log.Name()); !f.closing.Load() {
			m.Logger.Panic("the proxy before the member ended at its start: " + string(said))
		}
	}()
	return f, nil
}

// serving waits until the proxy can be reached, or has ended.
func (f *memberFront) serving(address string) bool {
	for {
		conn, err := net.Dial("unix", address)
		if err == nil {
			conn.Close()
			return true
		}
		select {
		case <-f.ended:
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (f *memberFront) accept(address string) {
	for {
		client, err := f.clients.Accept()
		if err != nil {
			return
		}
		proxy, err := net.Dial("unix", address)
		if err != nil {
			client.Close()
			continue
		}
		join := func(to, from net.Conn) {
			_, _ = io.Copy(to, from)
			to.Close()
			from.Close()
		}
		go join(client, proxy)
		go join(proxy, client)
	}
}

// Close ends the proxy: it drains, as etcd does, and is killed when the member's own patience is over.
func (f *memberFront) Close() error {
	f.once.Do(func() {
		f.closing.Store(true)
		f.clients.Close()
		_ = f.proxy.Process.Signal(syscall.SIGTERM)
		go func() {
			select {
			case <-f.ended:
			case <-time.After(2 * time.Second):
				_ = f.proxy.Process.Kill()
				<-f.ended
			}
			if said, err := os.ReadFile(filepath.Join(f.dir, "log")); err == nil && os.Getenv("SCOREBOARD_LOG") != "" {
				os.Stderr.Write(said)
			}
			os.RemoveAll(f.dir)
		}()
	})
	if err := f.Listener.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func absolute(file string) string {
	if file == "" {
		return ""
	}
	path, err := filepath.Abs(file)
	if err != nil {
		return file
	}
	return path
}

// behindFront is the member's TLS towards the proxy: none, as it is the proxy that meets the clients.
func behindFront(*tls.Config) *tls.Config { return nil }
