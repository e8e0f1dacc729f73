package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

func newSetup() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "setup COMMAND",
		Short: "make the files that a deployment needs before its first start",
		Args:  cobra.NoArgs,
		RunE:  needsCommand,
	}
	cmd.AddCommand(newSetupCompose())
	return cmd
}

func newSetupCompose() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "compose",
		Short: "make certificates, a local key and the configuration for docker-compose.yml",
		Long: `setup compose is the job "setup" of the project's docker-compose.yml. Below DIR, where the file mounts a volume for each reader, it makes three
certificate authorities and the certificates of etcd, the proxies, kube-apiserver and the clients, a local key file, and the proxies' configuration.

It may run again and again: what is there and still good is kept, certificates in the last third of their lifetime are replaced, and a key file is never
replaced. The configuration is written again from the environment:

  KMS                        local (the default) or alibaba
  ALIBABA_KMS_REGION         the key's region, for example cn-hangzhou
  ALIBABA_KMS_KEY_ID         the key's ID, alias or ARN
  ALIBABA_KMS_ENDPOINT       host or host:port of the KMS; empty: the region's public one
  ALIBABA_KMS_CREDENTIALS    accessKey (the default), sts or ecsRAMRole

With alibaba, values that were written with the local key stay readable. The way back needs the proxies' rules to be changed by hand and is refused here.`,
		Args: cobra.NoArgs,
	}
	dir := cmd.Flags().String("dir", "/setup", "`DIR` that holds a folder for each reader")
	cmd.RunE = fails(func(*cobra.Command, []string) error {
		err := setupCompose(*dir, os.Getenv, time.Now())
		if _, ok := errors.AsType[*failure](err); ok || err == nil {
			return err
		}
		f := &failure{code: exitFailure, err: err}
		switch {
		case errors.Is(err, fs.ErrPermission):
			f.hint = fmt.Sprintf("the folders belong to the user of the image, 65532, and this runs as %d: remove `user:` from the service, or give them to this user", os.Getuid())
		case errors.Is(err, syscall.ENOSPC):
			f.hint = "make room on the disk that holds Docker's volumes, and start again"
		case errors.Is(err, syscall.EROFS):
			f.hint = "mount the volumes of this job writable"
		case errors.Is(err, fs.ErrNotExist):
			f.hint = "make the folder, or name another with --dir"
		}
		return f
	})
	return cmd
}
