package integration

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/tests/v3/framework/front"
	"go.uber.org/zap"
)

// withRoom raises the limit on requests as an operator does who adds a proxy.
func withRoom(c config.ServerConfig) config.ServerConfig {
	c.MaxRequestBytes += front.Overhead
	return c
}

// front puts a proxy between the member's clients and its gRPC server. Connections to the
// member's listener are passed to the proxy, and the proxy connects to the listener that is
// returned. Closing that one ends the proxy as a supervisor does.
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
	proxy   *front.Proxy
	once    sync.Once
	closing atomic.Bool
}

func (m *Member) newFront() (*memberFront, error) {
	dir, err := os.MkdirTemp("", "front")
	if err != nil {
		return nil, err
	}
	c := front.Config{Name: m.Name, Dir: dir, Endpoint: filepath.Join(dir, "etcd.sock"), MaxRequestBytes: int(m.MaxRequestBytes)}
	l := front.Listener{Network: "unix", Address: filepath.Join(dir, "proxy.sock")}
	if i := m.ClientTLSInfo; i != nil {
		l.CertFile, l.KeyFile, l.ClientCAFile, l.ClientCRLFile = i.CertFile, i.KeyFile, i.TrustedCAFile, i.CRLFile
		l.CipherSuites = front.SuiteNames(i.CipherSuites)
	}
	c.Listeners = []front.Listener{l}
	f := &memberFront{clients: m.GRPCListener}
	if f.Listener, err = net.Listen("unix", c.Endpoint); err != nil {
		return nil, err
	}
	if f.proxy, err = front.Start(c); err != nil {
		return nil, err
	}
	// The member does not wait for its proxy: its peers would wait for it.
	go func() {
		err := f.proxy.Serves()
		if err == nil {
			f.accept(l.Address)
		} else if !f.closing.Load() {
			m.Logger.Panic("start the proxy before the member", zap.Error(err))
		}
	}()
	return f, nil
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

// Close ends the proxy, which drains as etcd does.
func (f *memberFront) Close() error {
	f.once.Do(func() {
		f.closing.Store(true)
		f.clients.Close()
		go f.proxy.Stop()
	})
	if err := f.Listener.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// behindFront is the member's TLS towards the proxy: none, because the proxy serves the clients.
func behindFront(*tls.Config) *tls.Config { return nil }
