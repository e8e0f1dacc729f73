package kmstest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"testing"

	"go.uber.org/goleak"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemory(t *testing.T) {
	Conformance(t, func(*testing.T) kmsclient.Service { return NewMemory() })
}

// TestWithoutGenerator runs the suite on a service that makes no data keys.
func TestWithoutGenerator(t *testing.T) {
	Conformance(t, func(*testing.T) kmsclient.Service { return struct{ kmsclient.Service }{NewMemory()} })
}

// TestBroken shows that the suite refuses each broken backend by the checks that are meant to, and
// that each check refuses one.
func TestBroken(t *testing.T) {
	proven := map[string]bool{}
	for name, c := range broken {
		for _, want := range c.want {
			proven[want] = true
		}
		t.Run(name, func(t *testing.T) {
			for _, want := range c.want {
				i := slices.IndexFunc(checks, func(c check) bool { return c.name == want })
				err := runCheck(t.Context(), checks[i], newBroken(name))
				if err == nil {
					t.Errorf("passes the check %q", want)
				}
				t.Logf("%s: %v", want, err)
			}
		})
	}
	for _, c := range checks {
		if !proven[c.name] {
			t.Errorf("no backend here fails the check %q", c.name)
		}
	}
}

// TestOptions shows what each option lets pass, and that it is needed.
func TestOptions(t *testing.T) {
	short := func(*testing.T) kmsclient.Service {
		b := &bent{Memory: NewMemory()}
		b.encrypt = func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
			if len(data) > 100 {
				return nil, errors.New("too long")
			}
			return b.Memory.Encrypt(ctx, "", data)
		}
		return b
	}
	for name, c := range map[string]struct {
		newService func(*testing.T) kmsclient.Service
		option     Option
	}{
		"MaxPlaintext":   {short, MaxPlaintext(100)},
		"DamagedClasses": {func(*testing.T) kmsclient.Service { return newBroken("damage is of no key") }, DamagedClasses(kmsclient.ClassKeyUnusable)},
		"Opaque":         {func(*testing.T) kmsclient.Service { return newBroken("damage without class") }, Opaque()},
	} {
		t.Run(name, func(t *testing.T) {
			Conformance(t, c.newService, c.option)
			var errs []error
			for _, check := range checks {
				errs = append(errs, runCheck(t.Context(), check, c.newService(t)))
			}
			if errors.Join(errs...) == nil {
				t.Error("the suite passes without the option too")
			}
		})
	}
	for _, name := range []string{"damaged ciphertext", "unknown key"} {
		i := slices.IndexFunc(checks, func(c check) bool { return c.name == name })
		if runCheck(t.Context(), checks[i], newBroken("ignores damage"), Opaque()) == nil {
			t.Errorf("an opaque backend need not fail the check %q", name)
		}
	}
}

// TestConformanceFails runs Conformance on a broken backend in a process of its own, which has to
// report it and to exit with an error.
func TestConformanceFails(t *testing.T) {
	const env = "KMSTEST_BROKEN"
	if name := os.Getenv(env); name != "" {
		Conformance(t, func(*testing.T) kmsclient.Service { return newBroken(name) })
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestConformanceFails$")
	cmd.Env = append(os.Environ(), env+"=wrong key ID in Status")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("the process ended with %v:\n%s", err, out)
	}
	if failed := regexp.MustCompile(`--- FAIL: TestConformanceFails/(\w+)`).FindAllSubmatch(out, -1); len(failed) != 2 {
		t.Errorf("failed subtests: %q, want status and data_keys:\n%s", failed, out)
	}
}
