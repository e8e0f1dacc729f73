package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba"
)

// alibabaConfig says to the backend what the file says.
func alibabaConfig(a *config.Alibaba, log *slog.Logger) alibaba.Config {
	c := a.Credentials
	return alibaba.Config{
		Region: a.Region, KeyID: a.KeyID, Endpoint: a.Endpoint, CAFile: a.CAFile, EncryptionContext: a.EncryptionContext,
		Credentials: alibaba.Credentials{
			Type:            c.Type,
			AccessKeyIDFile: c.AccessKeyIDFile, AccessKeySecretFile: c.AccessKeySecretFile, SecurityTokenFile: c.SecurityTokenFile,
			Base: c.Base, RoleARN: c.RoleARN, OIDCProviderARN: c.OIDCProviderARN, OIDCTokenFile: c.OIDCTokenFile,
			ExternalID: c.ExternalID, SessionName: c.SessionName, Policy: c.Policy, Duration: c.Duration,
			STSEndpoint: c.STSEndpoint, STSCAFile: c.STSCAFile,
			RoleName: c.RoleName, AllowMetadataV1: c.AllowMetadataV1,
		},
		Logger: log,
	}
}

// ramPolicy returns the least that the callers of all configured keys of Alibaba Cloud need.
func ramPolicy(ctx context.Context, providers []config.KMS, observe func(kmsclient.Call)) (*alibaba.RAMPolicy, error) {
	var keys []string
	for _, k := range providers {
		if k.Alibaba == nil {
			continue
		}
		key := alibaba.KeyARN(k.Alibaba.Region, k.Alibaba.KeyID)
		if key == "" {
			var err error
			if key, err = keyOfAlias(ctx, k, observe); err != nil {
				return nil, &failure{
					code: exitFailure, err: fmt.Errorf("kms %q: the key of %s: %w", k.Name, k.Alibaba.KeyID, err),
					hint: "write the key's id or ARN in place of the alias, or call this as someone who has kms:DescribeKey",
				}
			}
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, &failure{code: exitFailure, err: errors.New("no key of Alibaba Cloud KMS is configured"), hint: "add one under kms"}
	}
	slices.Sort(keys)
	return alibaba.NewRAMPolicy(slices.Compact(keys)...), nil
}

func keyOfAlias(ctx context.Context, k config.KMS, observe func(kmsclient.Call)) (arn string, err error) {
	b, err := alibaba.New(alibabaConfig(k.Alibaba, slog.New(slog.DiscardHandler)))
	if err != nil {
		return "", err
	}
	defer func() { _ = b.Close() }()
	_, err = observed(k.Name, observe, func(ctx context.Context) (*kmsclient.KeyInfo, error) {
		arn, err = b.KeyARN(ctx)
		return &kmsclient.KeyInfo{KeyID: arn}, err
	})(ctx)
	return arn, err
}
