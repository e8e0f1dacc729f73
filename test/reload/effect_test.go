package reload

import (
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/metadata"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestPassword changes the password of the proxy's user in etcd and in the file, in either order.
// The proxy must continue what it does as this user, without a restart.
func TestPassword(t *testing.T) {
	e := harness.New(t)
	etcd := e.StartEtcd(harness.EtcdConfig{})
	auth := pb.NewAuthClient(harness.Dial(t, etcd.Address, nil))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := auth.UserAdd(t.Context(), &pb.AuthUserAddRequest{Name: "root", Password: "first"})
	must(err)
	_, err = auth.RoleAdd(t.Context(), &pb.AuthRoleAddRequest{Name: "root"})
	must(err)
	_, err = auth.UserGrantRole(t.Context(), &pb.AuthUserGrantRoleRequest{User: "root", Role: "root"})
	must(err)
	_, err = auth.AuthEnable(t.Context(), &pb.AuthEnableRequest{})
	must(err)
	file := e.File("password", []byte("first\n"))
	p := e.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{etcd.URL}, Username: "root", PasswordFile: file},
		KMS:  []harness.KMSConfig{e.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
		Log: harness.LogConfig{Level: "info"},
	})
	p.WaitReady(within)
	// renewed waits until the proxy has announced itself again: its lease was revoked, which it
	// finds out by a call as the user.
	current := "first"
	renewed := func(what string) {
		t.Helper()
		token, err := auth.Authenticate(t.Context(), &pb.AuthenticateRequest{Name: "root", Password: current})
		must(err)
		ctx := metadata.AppendToOutgoingContext(t.Context(), "token", token.Token)
		kv, leases := pb.NewKVClient(harness.Dial(t, etcd.Address, nil)), pb.NewLeaseClient(harness.Dial(t, etcd.Address, nil))
		announced := func() (lease int64) {
			t.Helper()
			harness.Eventually(t, within, what+": the announcement", func() error {
				r, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("/etcd-kms-proxy/proxies/"), RangeEnd: []byte("/etcd-kms-proxy/proxies0")})
				if err == nil && len(r.Kvs) != 1 {
					err = fmt.Errorf("there are %d", len(r.Kvs))
				}
				if err == nil {
					lease = r.Kvs[0].Lease
				}
				return err
			})
			return lease
		}
		_, err = leases.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: announced()})
		must(err)
		announced()
	}
	change := func(password string) {
		t.Helper()
		token, err := auth.Authenticate(t.Context(), &pb.AuthenticateRequest{Name: "root", Password: current})
		must(err)
		_, err = auth.UserChangePassword(metadata.AppendToOutgoingContext(t.Context(), "token", token.Token), &pb.AuthUserChangePasswordRequest{Name: "root", Password: password})
		must(err)
		current = password
	}
	write := func(password string) {
		t.Helper()
		must(os.WriteFile(file+".new", []byte(password+"\n"), 0o600))
		must(os.Rename(file+".new", file))
	}
	renewed("at the start")
	change("second")
	write("second")
	renewed("changed in etcd first")
	write("third")
	renewed("changed in the file, and not yet in etcd")
	change("third")
	renewed("changed in etcd, too")
	p.WaitReady(within)
	for _, password := range []string{"first", "second", "third"} {
		if strings.Contains(p.Log(), `"`+password) {
			t.Errorf("a password is in the log")
		}
	}
}

// TestCertificate checks that new connections get the new certificate, and that open ones continue.
func TestCertificate(t *testing.T) {
	e := harness.New(t)
	ca := e.NewCA("ca")
	etcd := e.StartEtcd(harness.EtcdConfig{})
	first, second := ca.Server("first"), ca.Server("second")
	mount := filepath.Join(e.Dir, "mount")
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	f := &folder{t: t, path: mount, style: "..data", files: make(map[string]string)}
	put := func(pair harness.Pair) {
		cert, key := read(t, pair.CertFile), read(t, pair.KeyFile)
		f.put(map[string]*string{"tls.crt": &cert, "tls.key": &key})
	}
	put(first)
	p := e.StartProxy("proxy", harness.ProxyConfig{
		Listeners: []harness.Listener{{Address: harness.FreeAddress(t), TLS: &harness.ServerTLS{
			CertFile: filepath.Join(mount, "tls.crt"), KeyFile: filepath.Join(mount, "tls.key"), ClientCAFile: ca.File,
		}}},
		Etcd: harness.Upstream{Endpoints: []string{etcd.URL}}, KMS: []harness.KMSConfig{e.LocalKey("dev", 1)},
		Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
	})
	p.WaitReady(within)
	config := ca.ClientTLS(ca.Client("client", "client"))
	served := func() string {
		conn, err := tls.Dial("tcp", p.Address, config)
		if err != nil {
			return err.Error()
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	kv := pb.NewKVClient(harness.Dial(t, p.Address, config))
	get := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("/s/a")})
		return err
	}
	if err := get(); err != nil || served() != "first" {
		t.Fatalf("%v, %s", err, served())
	}
	put(second)
	harness.Eventually(t, within, "the new certificate", func() error {
		if name := served(); name != "second" {
			return fmt.Errorf("it is %s", name)
		}
		return nil
	})
	if err := get(); err != nil {
		t.Error(err)
	}
}
