package clients

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// python is Debian's own Python, for which Debian packages the clients. PATH may contain another
// one before it.
const python = "/usr/bin/python3"

// TestPythonGateway runs Debian's python3-etcd3gw over the JSON gateway.
func TestPythonGateway(t *testing.T) {
	t.Parallel()
	needs(t, "apt-get install python3-etcd3gw", python, "-c", "import etcd3gw")
	everyWay(t, "python3-etcd3gw", func(t *testing.T, p *pair) {
		p.program(t, nil, python, "testdata/etcd3gw_client.py")
		p.sealed(t)
	})
}

// TestPython runs Debian's python3-etcd3 over gRPC.
func TestPython(t *testing.T) {
	t.Parallel()
	needs(t, "apt-get install python3-etcd3", python, "-c", "import etcd3")
	everyWay(t, "python3-etcd3", func(t *testing.T, p *pair) {
		dir := p.program(t, nil, python, "testdata/etcd3_client.py")
		p.sealed(t)
		data, err := os.ReadFile(filepath.Join(dir, "snapshot.db"))
		if err != nil || len(data) == 0 || bytes.Contains(data, []byte(p.Sealed.Marker())) || !bytes.Contains(data, []byte(sealedPrefix)) {
			t.Errorf("the snapshot, of %d bytes, is not ciphertext: %v", len(data), err)
		}
	})
}

// needs skips the test if a trial run of a client fails. If CI is set, it fails the test: all
// clients must be installed there.
func needs(t *testing.T, install, command string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), command, args...).CombinedOutput()
	switch {
	case err == nil:
	case os.Getenv("CI") != "":
		t.Fatalf("%s %q: %v\n%s\nto install it: %s", command, args, err, out, install)
	default:
		t.Skipf("it is not installed; to install it: %s", install)
	}
}

// everyWay runs a client's test with each version of etcd that can be built, and with TLS.
func everyWay(t *testing.T, client string, work func(*testing.T, *pair)) {
	for _, version := range []string{"3.5", "3.6", "3.7", "3.8"} {
		if version != "3.7" && testing.Short() {
			continue
		}
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			p := newPair(t, version)
			p.proxy.RecordTested(client)
			work(t, p)
		})
	}
	t.Run("TLS", func(t *testing.T) {
		t.Parallel()
		work(t, newTLSPair(t, "3.7"))
	})
}

// program runs a client in another language on both etcds, and compares its output line by line.
// The client gets an endpoint, the prefix of the values to write, and a folder for files; program
// returns the folder of the run on the proxy. The paths of the certificates are in the client's
// environment.
func (p *pair) program(t *testing.T, env []string, command string, args ...string) (dir string) {
	t.Helper()
	if p.ca != nil {
		env = append(env, "ETCD_CA="+p.ca.File, "ETCD_CERT="+p.client.CertFile, "ETCD_KEY="+p.client.KeyFile)
	}
	secret := p.Sealed.Value("v")
	output, dirs := [2]string{}, [2]string{t.TempDir(), t.TempDir()}
	ctx, cancel := context.WithTimeout(t.Context(), 2*within)
	defer cancel()
	var both sync.WaitGroup
	for i, endpoint := range []string{p.bare.URL, p.proxy.URL()} {
		both.Go(func() {
			cmd := exec.CommandContext(ctx, command, append(args[:len(args):len(args)], endpoint, secret, dirs[i])...)
			cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + dirs[i], "PYTHONDONTWRITEBYTECODE=1"}, env...)
			var out, errs bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			if err := cmd.Run(); err != nil {
				t.Errorf("%s %q on %s: %v, %v\n%s\nits last words: %s", command, args, endpoint, err, ctx.Err(), errs.Bytes(), last(out.String()))
			}
			output[i] = out.String()
		})
	}
	both.Wait()
	want, got := strings.Split(output[0], "\n"), strings.Split(output[1], "\n")
	for i := range max(len(want), len(got)) {
		if i == len(want) || i == len(got) {
			t.Errorf("bare etcd: %d lines, the proxy: %d", len(want), len(got))
			break
		}
		if want[i] != got[i] {
			t.Errorf("bare etcd: %.2000s\nthe proxy: %.2000s", want[i], got[i])
		}
	}
	if !strings.Contains(output[1], secret) {
		t.Error("no value has come through")
	}
	return dirs[1]
}

// last returns the last line.
func last(s string) string {
	s = strings.TrimSuffix(s, "\n")
	return s[strings.LastIndexByte(s, '\n')+1:]
}

const sealedPrefix = "k8s:enc:kms:v2:dev:"

// sealed checks all that etcd stores. The client may have created users before.
func (p *pair) sealed(t *testing.T) {
	t.Helper()
	conn := harness.Dial(t, p.behind.Address, p.behind.TLS)
	if enabled, err := pb.NewAuthClient(conn).AuthStatus(t.Context(), &pb.AuthStatusRequest{}); err == nil && enabled.Enabled {
		t.Fatal("the client has left users behind")
	}
	stored, err := pb.NewKVClient(conn).Range(t.Context(), &pb.RangeRequest{Key: []byte("\x00"), RangeEnd: []byte("\x00")})
	if err != nil || len(stored.Kvs) < 3 {
		t.Fatalf("what etcd holds: %d keys, %v", len(stored.GetKvs()), err)
	}
	for _, kv := range stored.Kvs {
		if !bytes.HasPrefix(kv.Value, []byte(sealedPrefix)) {
			t.Errorf("%q is not sealed", kv.Key)
		}
	}
}
