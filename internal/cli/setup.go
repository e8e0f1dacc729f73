package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/composesetup"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

func newSetup() *cobra.Command {
	return command.Group("setup", "create the files that a deployment needs before its first start", newSetupCompose())
}

func newSetupCompose() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "compose",
		Short: "create certificates, a local key and the configuration for docker-compose.yml",
		Long: `setup compose is the service "setup" of the project's docker-compose.yml. Below DIR, where the file
mounts a volume for each reader, it creates three certificate authorities and the certificates of
etcd, the proxies, kube-apiserver and the clients, a local key file, and the configuration of the
proxies.

It can run repeatedly: valid files are kept, certificates in the last third of their lifetime are
replaced, and a key file is never replaced. The configuration is written from the environment each
time:

  KMS                        local (the default) or alibaba
  ALIBABA_KMS_REGION         the key's region, for example cn-hangzhou
  ALIBABA_KMS_KEY_ID         the key's ID, alias or ARN
  ALIBABA_KMS_ENDPOINT       host or host:port of the KMS; empty: the region's public one
  ALIBABA_KMS_CREDENTIALS    accessKey (the default), sts or ecsRAMRole

With alibaba, values that were written with the local key stay readable. To go back to local, change
the rules of the proxies by hand: the command refuses it.`,
		Args: command.NoArgs,
	}
	dir := cmd.Flags().String("dir", "/setup", "`DIR` with a folder for each reader")
	cmd.RunE = command.Run(func(*cobra.Command, []string) error {
		err := composesetup.Run(*dir, os.Getenv, time.Now())
		hint := ""
		switch {
		case errors.Is(err, fs.ErrPermission):
			hint = fmt.Sprintf("the folders belong to the user of the image, 65532, and this runs as %d: remove `user:` from the service, or give them to this user", os.Getuid())
		case errors.Is(err, syscall.ENOSPC):
			hint = "make room on the disk that has Docker's volumes, and start again"
		case errors.Is(err, syscall.EROFS):
			hint = "mount the volumes of this job writable"
		case errors.Is(err, fs.ErrNotExist):
			hint = "create the folder, or name another with --dir"
		}
		if _, ok := errors.AsType[problem.Problem](err); ok || hint == "" {
			return err
		}
		return problem.WithHint(err, hint)
	})
	return cmd
}
