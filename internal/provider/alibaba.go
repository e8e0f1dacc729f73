package provider

import (
	"context"
	"log/slog"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba"
)

// alibabaConfig returns the backend's form of a.
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

// RAMPolicy returns the least privileges that the proxy needs on the Alibaba Cloud keys among
// providers, as a RAM policy that encodes to JSON. It calls the KMS only for keys that
// are configured by an alias, and observe is called for each call.
func RAMPolicy(ctx context.Context, providers []config.KMS, observe func(kmsclient.Call)) (any, error) {
	var keys []string
	for _, k := range providers {
		if k.Alibaba == nil {
			continue
		}
		key := alibaba.KeyARN(k.Alibaba.Region, k.Alibaba.KeyID)
		if key == "" {
			var err error
			if key, err = keyOfAlias(ctx, k, observe); err != nil {
				return nil, problem.New("write the key's ID or ARN instead of the alias, or run the command with credentials that have kms:DescribeKey",
					"kms %q: the key of %s: %w", k.Name, k.Alibaba.KeyID, err)
			}
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, problem.New("add one under kms", "no key of Alibaba Cloud KMS is configured")
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
	_, err = Observed(k.Name, observe, func(ctx context.Context) (*kmsclient.KeyInfo, error) {
		arn, err = b.KeyARN(ctx)
		return &kmsclient.KeyInfo{KeyID: arn}, err
	})(ctx)
	return arn, err
}
