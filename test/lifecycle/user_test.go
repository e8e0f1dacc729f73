package lifecycle

import (
	"os"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/metadata"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestUser checks that with etcd's authentication on, the proxy and the commands log in as
// etcd.username, whether they started before or after it was turned on.
func TestUser(t *testing.T) {
	for _, version := range harness.Versions(t) {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			password := filepath.Join(t.TempDir(), "password")
			if err := os.WriteFile(password, []byte("pw\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			s := newSite(t, version, func(c *harness.ProxyConfig) { c.Etcd.Username, c.Etcd.PasswordFile = "root", password })
			put(t, s.raw, prefix+"a", mark)
			s.run(t, 1, "status")

			auth := pb.NewAuthClient(harness.Dial(t, s.etcd.Address, nil))
			ctx := t.Context()
			if _, err := auth.UserAdd(ctx, &pb.AuthUserAddRequest{Name: "root", Password: "pw"}); err != nil {
				t.Fatal(err)
			}
			if _, err := auth.RoleAdd(ctx, &pb.AuthRoleAddRequest{Name: "root"}); err != nil {
				t.Fatal(err)
			}
			if _, err := auth.UserGrantRole(ctx, &pb.AuthUserGrantRoleRequest{User: "root", Role: "root"}); err != nil {
				t.Fatal(err)
			}
			if _, err := auth.AuthEnable(ctx, &pb.AuthEnableRequest{}); err != nil {
				t.Fatal(err)
			}
			s.run(t, 0, "reencrypt", "1 rewritten")
			s.run(t, 0, "status", "as here")

			s.proxy.Stop(within)
			s.etcd.Stop(within)
			s.proxy.Start()
			s.etcd.Start()
			s.proxy.WaitReady(within)
			token, err := auth.Authenticate(ctx, &pb.AuthenticateRequest{Name: "root", Password: "pw"})
			if err != nil {
				t.Fatal(err)
			}
			ctx = metadata.AppendToOutgoingContext(ctx, "token", token.Token)
			harness.Eventually(t, within, "a value through the proxy", func() error {
				_, err := s.kv.Range(ctx, &pb.RangeRequest{Key: []byte(prefix + "a")})
				return err
			})
			s.run(t, 0, "status", "as here")

			if err := os.WriteFile(password, []byte("another\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			s.run(t, 3, "status", "authentication failed, invalid user ID or password")
		})
	}
}
