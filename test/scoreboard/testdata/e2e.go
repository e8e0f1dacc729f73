package e2e

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/tests/v3/framework/front"
	"go.uber.org/zap"
)

// memberFront puts a proxy in front of a member's process: the proxy listens on the client URL
// that the tests know, and that the member advertises. The member listens on sockets instead.
type memberFront struct {
	cfg     *EtcdServerProcessConfig
	sockets string // the folder of etcd's sockets
	limit   int
	both    bool // the client URL is served with and without TLS

	proxy    *front.Proxy
	sniffing net.Listener
}

// putInFront changes the flags of a member that has not started.
func putInFront(cfg *EtcdServerProcessConfig) *memberFront {
	dir, err := os.MkdirTemp("", "m")
	if err != nil {
		panic(err)
	}
	f := &memberFront{cfg: cfg, sockets: dir, limit: 1572864}
	var args []string
	for _, arg := range cfg.Args {
		name, value, _ := strings.Cut(arg, "=")
		switch name {
		case "--listen-client-urls":
			f.both = strings.Contains(value, ",")
			arg = name + "=unix://" + f.socket()
		case "--listen-client-http-urls":
			arg = name + "=unix://" + f.httpSocket()
		case "--max-request-bytes":
			if f.limit, err = strconv.Atoi(value); err != nil {
				panic(err)
			}
			continue
		case "--auto-tls": // the proxy has the certificate
			continue
		}
		args = append(args, arg)
	}
	cfg.Args = append(args, fmt.Sprintf("--max-request-bytes=%d", f.limit+front.Overhead))
	return f
}

func (f *memberFront) socket() string     { return filepath.Join(f.sockets, "etcd") }
func (f *memberFront) httpSocket() string { return filepath.Join(f.sockets, "http") }

// start starts the proxy when the member is ready. It returns when the proxy serves.
func (f *memberFront) start(err error) error {
	f.stop()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "p")
	if err != nil {
		return err
	}
	c := front.Config{Name: f.cfg.Name, Dir: dir, Endpoint: f.socket(), MaxRequestBytes: f.limit}
	plain, err := listener(f.cfg.ClientURL)
	if err != nil {
		return err
	}
	secure := plain
	if err := f.secure(&secure, dir); err != nil {
		return err
	}
	address := plain.Address
	switch {
	case f.both:
		// The proxy has a listener for each.
		plain.Network, plain.Address = "unix", filepath.Join(dir, "plain")
		secure.Network, secure.Address = "unix", filepath.Join(dir, "tls")
		c.Listeners = []front.Listener{plain, secure}
	case f.cfg.Client.ConnectionType == ClientTLS:
		c.Listeners = []front.Listener{secure}
	default:
		c.Listeners = []front.Listener{plain}
	}
	if f.cfg.ClientHTTPURL != "" {
		c.HTTPEndpoint = f.httpSocket()
		l, err := listener(f.cfg.ClientHTTPURL)
		if err != nil {
			return err
		}
		http := c.Listeners[0]
		http.Network, http.Address = l.Network, l.Address
		c.Listeners = append(c.Listeners, http)
	}
	if f.proxy, err = front.Start(c); err != nil {
		return err
	}
	if err := f.proxy.Serves(); err != nil {
		return err
	}
	if f.both {
		return f.sniff(address, plain.Address, secure.Address)
	}
	return nil
}

// secure adds TLS, by the flags of the member.
func (f *memberFront) secure(l *front.Listener, dir string) error {
	if f.cfg.Client.AutoTLS {
		info, err := transport.SelfCert(zap.NewNop(), filepath.Join(dir, "cert"), []string{"localhost"}, 1)
		l.CertFile, l.KeyFile = info.CertFile, info.KeyFile
		return err
	}
	args := f.cfg.TLSArgs
	for i := 0; i+1 < len(args); i++ {
		switch args[i] {
		case "--cert-file":
			l.CertFile = args[i+1]
		case "--key-file":
			l.KeyFile = args[i+1]
		case "--trusted-ca-file":
			l.ClientCAFile = args[i+1]
		case "--client-crl-file":
			l.ClientCRLFile = args[i+1]
		case "--cipher-suites":
			l.CipherSuites = strings.Split(args[i+1], ",")
		}
	}
	return nil
}

func (f *memberFront) stop() { f.end((*front.Proxy).Stop) }
func (f *memberFront) kill() { f.end((*front.Proxy).Kill) }

func (f *memberFront) end(how func(*front.Proxy)) {
	if f.sniffing != nil {
		f.sniffing.Close()
		f.sniffing = nil
	}
	if f.proxy != nil {
		how(f.proxy)
		f.proxy = nil
	}
}

// check reads what the member stored. It has ended.
func (f *memberFront) check() {
	if err := front.Check(f.cfg.Name, f.cfg.DataDirPath); err != nil {
		f.cfg.lg.Warn("read the member's file", zap.Error(err))
	}
}

// sniff accepts connections and passes them to the socket that fits their first byte.
func (f *memberFront) sniff(address, plain, secure string) error {
	var err error
	if f.sniffing, err = net.Listen("tcp", address); err != nil {
		return err
	}
	go func(l net.Listener) {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go pass(client, plain, secure)
		}
	}(f.sniffing)
	return nil
}

func pass(client net.Conn, plain, secure string) {
	defer client.Close()
	var first [1]byte
	if _, err := io.ReadFull(client, first[:]); err != nil {
		return
	}
	to := plain
	if first[0] == 0x16 {
		to = secure
	}
	proxy, err := net.DialTimeout("unix", to, time.Second)
	if err != nil {
		return
	}
	defer proxy.Close()
	if _, err := proxy.Write(first[:]); err != nil {
		return
	}
	var join sync.WaitGroup
	for _, c := range [][2]net.Conn{{proxy, client}, {client, proxy}} {
		join.Go(func() {
			_, _ = io.Copy(c[0], c[1])
			c[0].Close()
			c[1].Close()
		})
	}
	join.Wait()
}

// listener is the address of a client URL. A socket of a member is a file of that name in its
// folder.
func listener(clientURL string) (front.Listener, error) {
	u, err := url.Parse(clientURL)
	if err != nil {
		return front.Listener{}, err
	}
	if strings.HasPrefix(u.Scheme, "unix") {
		path, err := filepath.Abs(u.Host + u.Path)
		return front.Listener{Network: "unix", Address: path}, err
	}
	return front.Listener{Network: "tcp", Address: u.Host}, nil
}
