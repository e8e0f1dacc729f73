package coordination

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/metadata"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// enableAuth turns etcd's authentication on, with root as its only user.
func enableAuth(t *testing.T, address string) pb.AuthClient {
	t.Helper()
	auth := pb.NewAuthClient(harness.Dial(t, address, nil))
	_, err := auth.UserAdd(t.Context(), &pb.AuthUserAddRequest{Name: "root", Password: "pw"})
	if err == nil {
		_, err = auth.RoleAdd(t.Context(), &pb.AuthRoleAddRequest{Name: "root"})
	}
	if err == nil {
		_, err = auth.UserGrantRole(t.Context(), &pb.AuthUserGrantRoleRequest{User: "root", Role: "root"})
	}
	if err == nil {
		_, err = auth.AuthEnable(t.Context(), &pb.AuthEnableRequest{})
	}
	if err != nil {
		t.Fatal(err)
	}
	return auth
}

// TestAuthTurnedOn checks that a running proxy without an etcd user warns, after etcd's
// authentication was turned on, that it will not serve after a restart, and that both remedies in
// the warning work.
func TestAuthTurnedOn(t *testing.T) {
	t.Parallel()
	for name, coordination := range map[string]*harness.Coordination{"alone": harness.NoCoordination(), "coordinated": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.cfg.Coordination = coordination
			p := s.StartProxy("proxy", s.cfg)
			p.WaitReady(within)
			if metrics := p.Scrape(); !strings.Contains(metrics, "etcd_kms_proxy_guard_record_readable 1\n") {
				t.Error("the metric is not 1 at the start")
			}
			auth := enableAuth(t, s.etcd.Address)
			hint := []string{"etcd.username", "--allow-weakening"}
			tells := func(what, text string) error {
				for _, h := range hint {
					if !strings.Contains(text, h) {
						return fmt.Errorf("%s does not name %s: %s", what, h, text)
					}
				}
				return nil
			}
			line := func(text, part string) string {
				for _, l := range strings.Split(text, "\n") {
					if strings.Contains(l, part) {
						return l
					}
				}
				return ""
			}
			harness.Eventually(t, within, "the warning", func() error {
				if err := tells("/readyz", line(p.Report(), "[-]guard")); err != nil {
					return err
				}
				if err := tells("the log", line(p.Log(), "after its next restart it will serve nothing")); err != nil {
					return err
				}
				if !strings.Contains(p.Scrape(), "etcd_kms_proxy_guard_record_readable 0\n") {
					return fmt.Errorf("the metric is not 0")
				}
				return nil
			})
			if !strings.HasPrefix(p.Report(), "200\n") {
				t.Errorf("the proxy still serves, and is not ready: %s", p.Report())
			}

			p.Stop(within)
			p.Start()
			harness.Eventually(t, within, "the hint", func() error { return tells("the log", line(p.Log(), "the proxy serves nothing until")) })
			p.Stop(within)

			token, err := auth.Authenticate(t.Context(), &pb.AuthenticateRequest{Name: "root", Password: "pw"})
			if err != nil {
				t.Fatal(err)
			}
			ctx := metadata.AppendToOutgoingContext(t.Context(), "token", token.Token)
			puts := func(p *harness.Proxy) {
				t.Helper()
				kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
				harness.Eventually(t, within, "a put", func() error {
					_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(prefix + "a"), Value: []byte(s.Sealed.Value("a"))})
					return err
				})
			}
			p.Args = []string{"--allow-weakening"}
			p.Start()
			puts(p)
			p.Stop(within)

			password := filepath.Join(t.TempDir(), "password")
			if err := os.WriteFile(password, []byte("pw\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			s.cfg.Etcd.Username, s.cfg.Etcd.PasswordFile = "root", password
			user := s.StartProxy("user", s.cfg)
			user.WaitReady(within)
			puts(user)
		})
	}
}
