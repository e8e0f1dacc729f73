package compose

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// wrongClock has certificates that begin tomorrow: the clock of the machine that made them was a
// day ahead, or this machine's clock is a day behind.
func wrongClock(t *testing.T) {
	s := newStack(t, composeV2(t))
	s.up()
	dir := filepath.Join(t.TempDir(), "ca")
	s.docker("cp", s.container("setup")+":/setup/ca", dir)
	authority, err := tls.LoadX509KeyPair(filepath.Join(dir, "etcd.crt"), filepath.Join(dir, "etcd.key"))
	if err != nil {
		t.Fatal(err)
	}
	later := *authority.Leaf
	later.NotBefore = time.Now().Add(24 * time.Hour)

	// The certificates of the members: the proxies say so.
	servers := filepath.Join(t.TempDir(), "etcd")
	s.docker("cp", s.container("setup")+":/setup/etcd", servers)
	for _, member := range []string{"etcd-1", "etcd-2", "etcd-3"} {
		pair, err := tls.LoadX509KeyPair(filepath.Join(servers, member+".crt"), filepath.Join(servers, member+".key"))
		if err != nil {
			t.Fatal(err)
		}
		pair.Leaf.NotBefore = later.NotBefore
		s.put("etcd", "etcd-certificates", member+".crt", signed(t, pair.Leaf, authority.Leaf, pair.Leaf.PublicKey, authority.PrivateKey))
	}
	s.docker("restart", s.container("proxy-1"))
	s.says("proxy-1", "certificate has expired or is not yet valid", "is before "+later.NotBefore.UTC().Format("2006-01-02"))
	s.docker("start", "--attach", s.container("setup")) // which makes new ones
	s.docker("restart", s.container("proxy-1"))
	s.healthy("proxy-1")
	s.run("run", "--rm", "-e", "ETCDCTL_ENDPOINTS=https://proxy-1:2379", "etcdctl", "put", "key", "value")

	// The authority: setup says so, and changes nothing.
	s.put("ca", "ca", "etcd.crt", signed(t, &later, &later, later.PublicKey, authority.PrivateKey))
	if out, err := s.try(t.Context(), "up", "-d", "--force-recreate", "setup", "proxy-1"); err == nil {
		t.Errorf("it starts with a wrong clock:\n%s", out)
	}
	s.says("setup", "etcd.crt is valid from "+later.NotBefore.UTC().Format(time.RFC3339)+", and this machine's clock says ", "hint: set the clock right")
}

// signed returns a certificate as PEM.
func signed(t *testing.T, template, parent *x509.Certificate, key, signer any) []byte {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, signer)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// put writes a file into a volume that setup mounts at a folder.
func (s *stack) put(folder, volume, name string, data []byte) {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.docker("cp", path, s.container("setup")+":/setup/"+folder+"/"+name)
	s.volume(volume, "chown 65532:65532 /v/"+name+" && chmod 0600 /v/"+name)
}
