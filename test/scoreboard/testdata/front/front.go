// Package front starts an etcd-kms-proxy that encrypts every key in front of an etcd of a test.
// SCOREBOARD_PROXY is the program, and SCOREBOARD_KEY the file with its key. SCOREBOARD_RECORD is
// a file with a line for each proxy, and for each member whose file was read. SCOREBOARD_LOG
// shows the proxies' logs.
package front

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// Overhead is what encryption adds to a request, at most: some 170 bytes for each put of a
// transaction. An operator raises etcd's limit on requests by it.
const Overhead = 128 << 10

// Prefix is what every encrypted value begins with.
const Prefix = "k8s:enc:kms:v2:test:"

// Listener is an address of the proxy.
type Listener struct {
	Network, Address string // of package net

	CertFile, KeyFile, ClientCAFile, ClientCRLFile string
	CipherSuites                                   []string
}

// Config is where the proxy listens, and what is behind it.
type Config struct {
	Name      string // of the member, for the record
	Dir       string // for its files; removed in the end
	Listeners []Listener

	Endpoint, HTTPEndpoint string // sockets of etcd

	MaxRequestBytes int
}

// Proxy is a running proxy.
type Proxy struct {
	dir   string
	cmd   *exec.Cmd
	once  sync.Once
	ended chan struct{}

	listeners int
}

// Start starts a proxy. Its listeners may not serve yet.
func Start(c Config) (*Proxy, error) {
	file := filepath.Join(c.Dir, "config.json")
	if err := os.WriteFile(file, c.text(), 0o600); err != nil {
		return nil, err
	}
	// The etcds of a test have users that the proxy does not know. So it cannot read what proxies
	// agreed on.
	cmd := exec.Command(os.Getenv("SCOREBOARD_PROXY"), "serve", "--config", file, "--allow-weakening")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2")
	log, err := os.Create(filepath.Join(c.Dir, "log"))
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		log.Close()
		return nil, err
	}
	p := &Proxy{dir: c.Dir, cmd: cmd, ended: make(chan struct{}), listeners: len(c.Listeners)}
	go func() {
		_ = cmd.Wait()
		log.Close()
		close(p.ended)
	}()
	record("proxy", c.Name)
	return p, nil
}

// Serves waits until the proxy listens at all its addresses. It returns an error when the proxy has
// ended. Another process may accept connections at an address that the proxy cannot get.
func (p *Proxy) Serves() error {
	for {
		if strings.Count(p.log(), listening) >= p.listeners {
			return nil
		}
		select {
		case <-p.ended:
			return errors.New("the proxy ended: " + p.log())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// listening is in the log of the proxy once for each listener.
const listening = `"msg":"listening"`

// Stop drains the proxy, as etcd drains, and kills it when that takes too long.
func (p *Proxy) Stop() {
	p.end(syscall.SIGTERM)
}

// Kill kills the proxy.
func (p *Proxy) Kill() {
	p.end(syscall.SIGKILL)
}

func (p *Proxy) end(signal syscall.Signal) {
	p.once.Do(func() {
		_ = p.cmd.Process.Signal(signal)
		select {
		case <-p.ended:
		case <-time.After(2 * time.Second):
			_ = p.cmd.Process.Kill()
			<-p.ended
		}
		if os.Getenv("SCOREBOARD_LOG") != "" {
			fmt.Fprint(os.Stderr, p.log())
		}
		os.RemoveAll(p.dir)
	})
}

func (p *Proxy) log() string {
	text, _ := os.ReadFile(filepath.Join(p.dir, "log"))
	return string(text)
}

// text is the configuration as JSON, which is also YAML.
func (c Config) text() []byte {
	type object = map[string]any
	var listeners []object
	for _, l := range c.Listeners {
		address := l.Address
		if l.Network == "unix" {
			address = "unix://" + l.Address
		}
		listener := object{"address": address}
		if l.CertFile != "" {
			listener["tls"] = object{
				"certFile": absolute(l.CertFile), "keyFile": absolute(l.KeyFile), "clientCAFile": absolute(l.ClientCAFile),
				"clientCRLFile": absolute(l.ClientCRLFile), "cipherSuites": append([]string{}, l.CipherSuites...),
			}
		}
		listeners = append(listeners, listener)
	}
	etcd := object{"endpoints": []string{"unix://" + c.Endpoint}, "maxRequestBytes": c.MaxRequestBytes}
	if c.HTTPEndpoint != "" {
		etcd["httpEndpoints"] = []string{"unix://" + c.HTTPEndpoint}
	}
	text, err := json.Marshal(object{
		"apiVersion":   "etcd-kms-proxy.io/v1alpha1",
		"kind":         "ProxyConfiguration",
		"listeners":    listeners,
		"etcd":         etcd,
		"kms":          []object{{"name": "test", "local": object{"keyFile": os.Getenv("SCOREBOARD_KEY")}}},
		"rules":        []object{{"prefix": "", "writeWith": "test"}},
		"coordination": object{"enabled": false},
		"log":          object{"level": "info"},
	})
	if err != nil {
		panic(err)
	}
	return text
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

// SuiteNames are the names of cipher suites.
func SuiteNames(ids []uint16) []string {
	var names []string
	for _, id := range ids {
		names = append(names, tls.CipherSuiteName(id))
	}
	return names
}

// Check reads the values in the data directory of a member that has ended, and records how many
// are encrypted and how many are not.
func Check(name, dataDir string) error {
	db, err := bolt.Open(filepath.Join(dataDir, "member", "snap", "db"), 0o600, &bolt.Options{ReadOnly: true, Timeout: 5 * time.Second})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer db.Close()
	encrypted, plaintext, first := 0, 0, ""
	err = db.View(func(tx *bolt.Tx) error {
		bucket := tx.Bucket([]byte("key"))
		if bucket == nil {
			return nil
		}
		return bucket.ForEach(func(revision, data []byte) error {
			if len(revision) > 17 { // a deletion
				return nil
			}
			var kv mvccpb.KeyValue
			if err := proto.Unmarshal(data, &kv); err != nil {
				return err
			}
			if len(kv.Key) == 0 { // etcdutl snapshot restore --bump-revision writes it; clients cannot
				return nil
			}
			// Tests of etcd's corruption checks change the first byte of each value in the file.
			if len(kv.Value) > 0 && strings.HasPrefix(string(kv.Value[1:]), Prefix[1:]) {
				encrypted++
			} else if plaintext++; first == "" {
				first = string(kv.Key)
			}
			return nil
		})
	})
	if err == nil {
		record("values", name, encrypted, plaintext, first)
	}
	return err
}

var recording sync.Mutex

func record(fields ...any) {
	recording.Lock()
	defer recording.Unlock()
	line, err := json.Marshal(fields)
	if err != nil {
		panic(err)
	}
	file, err := os.OpenFile(os.Getenv("SCOREBOARD_RECORD"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	defer file.Close()
	if _, err := file.Write(append(line, '\n')); err != nil {
		panic(err)
	}
}
